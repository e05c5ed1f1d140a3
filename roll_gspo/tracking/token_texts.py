"""The text of each token of a response, for whoever shows tokens one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what a decoder says of bytes that are no whole character
_MAX_HELD = 8  # tokens in a row without a whole character; a character has four bytes at most


class TokenTexts:
    """Token ids to texts that, joined, are the decoded response.

    A character whose bytes lie in several tokens is the text of the last of them, and the others are empty. Bytes
    that never become a character are shown as the decoder shows them.

    Args:
        decode: token ids to text, special tokens left in.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> tuple[str, ...]:
        """One text a token."""
        alone = [self._alone(i) for i in ids]
        texts, held, said = [], [], ""
        for i, (token, text) in enumerate(zip(ids, alone, strict=True)):
            if not held and _BROKEN not in text:
                texts.append(text)
                continue
            held.append(token)
            decoded = self._decode(held)
            whole = decoded.rstrip(_BROKEN)
            ends = i + 1 == len(ids) or _BROKEN not in alone[i + 1] or len(held) == _MAX_HELD
            if ends or whole == decoded:
                whole, held = decoded, []
            texts.append(whole[len(said) :])
            said = whole if held else ""
        return tuple(texts)

    def _alone(self, token: int) -> str:
        """Text of one token within a text: some decoders drop the space before the first one."""
        if token not in self._known:
            once = self._decode([token])
            self._known[token] = self._decode([token, token])[len(once) :]
        return self._known[token]
