"""The text of each token of a response, for whoever shows tokens one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what a decoder says of bytes that are no whole character
_MAX_HELD = 8  # tokens in a row without a whole character
_MAX_PART = 3  # of these, the last ones may be a part of a character, which has four bytes at most


class TokenTexts:
    """Convert token ids to texts that, joined, are the decoded response.

    A character whose bytes lie in several tokens is the text of the last of them, and the others are empty. Bytes
    that never become a character are shown as the decoder shows them.

    Args:
        decode: converts token ids to text, special tokens included.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self._known: dict[int, str] = {}
        self._broken: set[int] = set()

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return one text per token."""
        for token in set(ids) - self._known.keys():
            self._learn(token)
        alone = [self._known[token] for token in ids]
        return alone if self._broken.isdisjoint(ids) else self._joined(ids, alone)

    def _joined(self, ids: Sequence[int], alone: Sequence[str]) -> list[str]:
        """Return the texts with each character of several tokens in the last of them."""
        texts, held, said = [], [], ""
        for i, (token, text) in enumerate(zip(ids, alone, strict=True)):
            if not held and token not in self._broken:
                texts.append(text)
                continue
            held.append(token)
            decoded = self.decode(held)
            whole = decoded.rstrip(_BROKEN)
            if i + 1 == len(ids) or ids[i + 1] not in self._broken or whole == decoded:
                whole, held = decoded, []
            texts.append(whole[len(said) :])
            said = whole if held else ""
            if len(held) == _MAX_HELD:
                held = self._part(held, decoded)
                given_up = decoded[: len(decoded) - len(self.decode(held))] if held else decoded
                texts[-1] += given_up[len(said) :]
                said = said[len(given_up) :]
        return texts

    def _part(self, held: Sequence[int], decoded: str) -> list[int]:
        """Return the last of the held tokens that may still become a character."""
        parts = (list(held[len(held) - size :]) for size in range(_MAX_PART, 0, -1))
        return next((part for part in parts if decoded.endswith(self.decode(part))), [])

    def _learn(self, token: int) -> None:
        """Find the text of one token within a text: some decoders drop the space before the first one."""
        once = self.decode([token])
        self._known[token] = text = self.decode([token, token])[len(once) :]
        if _BROKEN in text:
            self._broken.add(token)
