"""Data passed between the stages of a training step, as frozen dataclasses of named tensors.

Legend: B samples, R rows of tokens, S positions of prompt + response (right-padded), T response positions. A sample has
one row, unless it is an episode of several conversations. For a mixture of experts, L is the number of layers with a
router and K the number of experts per token.
Response tensors are aligned to the response: column t belongs to the t-th generated token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from roll_gspo.episode import Episode, EpisodeBranch


@dataclass(frozen=True)
class Prompt:
    """A prompt in the form that the generation engine receives.

    Attributes:
        token_ids: the templated prompt.
        text: `token_ids` decoded, for rollout dumps.
        row: the data row of the prompt (`ground_truth`, `domain`, `tag`, ...), for the rewards.
    """

    token_ids: tuple[int, ...]
    text: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: the generated tokens, including the end-of-sequence token if it was sampled.
        log_probs: log-probability of each token under the sampling distribution.
        finish_reason: `stop` (end-of-sequence or stop string), `length`, or `partial` if the response is unfinished.
        routed_experts: [P + R - 1, L, K] int16, the experts chosen for each of the P prompt and R response tokens
            except the last, from which nothing was predicted. None if routing was not recorded.
        version_runs: the weights that sampled the tokens, as (version, number of tokens) in the order of the tokens.
            Empty if the engine does not record them.
        episode: the turns of a response that is an episode; its given tokens have log-prob 0 and belong to the run of
            the answer before them. None for a response of one turn.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    routed_experts: Tensor | None = None
    version_runs: tuple[tuple[int, int], ...] = ()
    episode: Episode | None = None

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the model sampled, in all conversations of an episode; the others were given."""
        if self.episode is None:
            return len(self.token_ids)
        return sum(sum(one.mask) for one in (self.episode, *self.episode.branches))

    def runs(self, version: int) -> tuple[tuple[int, int], ...]:
        """Return `version_runs`, or one run of `version` if the engine does not record them."""
        return self.version_runs or ((version, len(self.token_ids)),)


@dataclass(frozen=True)
class Sequences:
    """Token sequences with a known border between prompt and response.

    Attributes:
        input_ids: [B, S] int64, prompt followed by response, right-padded.
        prompt_lengths: [B] int64, at least 1.
        response_mask: [B, T] bool, true on the tokens of the response. A false run in between (a gap) marks given
            tokens, e.g. the user's turns of a conversation. The last true position ends the sequence.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_mask: Tensor

    def __post_init__(self) -> None:
        batch, width = self.input_ids.shape
        if self.prompt_lengths.shape != (batch,) or self.response_mask.shape[0] != batch:
            raise ValueError("input_ids, prompt_lengths and response_mask disagree about B")
        # samples on a GPU are copies of checked ones; their lengths would wait for it
        if batch and self.input_ids.device.type == "cpu" and int(self.lengths.max()) > width:
            raise ValueError("a prompt and its response are longer than input_ids is wide")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    # Cached: every piece of the samples reads the lengths, so that splitting takes linear time.
    @cached_property
    def response_lengths(self) -> Tensor:
        """[B] number of response positions up to the last token, gaps included."""
        mask = self.response_mask
        ends = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return torch.where(mask, ends, 0).amax(-1)

    @cached_property
    def lengths(self) -> Tensor:
        """[B] length of prompt plus response, without padding."""
        return self.prompt_lengths + self.response_lengths

    @property
    def attention_mask(self) -> Tensor:
        """[B, S] bool, true on tokens, false on padding."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device) < self.lengths[:, None]

    @property
    def predicting_positions(self) -> Tensor:
        """[B, T] the position in S whose logits predict response token t (0 where masked)."""
        offsets = torch.arange(self.response_mask.shape[1], device=self.input_ids.device)
        positions = self.prompt_lengths[:, None] - 1 + offsets
        return torch.where(self.response_mask, positions, torch.zeros_like(positions))

    @property
    def predicting_mask(self) -> Tensor:
        """[B, S] bool, true on the positions whose logits predict response tokens."""
        # masked tokens add 0 somewhere; an index of unknown length would wait for the device
        counts = torch.zeros_like(self.input_ids, dtype=torch.int32)
        return counts.scatter_add_(1, self.predicting_positions, self.response_mask.int()) > 0

    @property
    def response_ids(self) -> Tensor:
        """[B, T] the response tokens (an arbitrary valid id where masked)."""
        following = torch.where(self.response_mask, self.predicting_positions + 1, 0)
        return self.input_ids.gather(1, following)

    def rows(self, index: Tensor) -> Sequences:
        """Return the samples of `index`, trimmed to their own maximum widths."""
        width, response_width = self.trimmed_widths(index)
        return Sequences(
            self.input_ids[index, :width],
            self.prompt_lengths[index],
            self.response_mask[index, :response_width],
        )

    def trimmed_widths(self, index: Tensor) -> tuple[int, int]:
        """Return the smallest (S, T) that hold the samples of `index`; both are at least 1."""
        width = int(self.lengths[index].max())
        return max(width, 1), max(int(self.response_lengths[index].max()), 1)

    @staticmethod
    def collate(
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pad: int,
        masks: Sequence[Sequence[bool]] | None = None,
    ) -> Sequences:
        """Pad `prompt + response` pairs on the right into one batch; `masks` mark the gaps of the responses."""
        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        response_width = max(1, max(len(r) for r in responses))
        input_ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            tokens = torch.tensor([*prompt, *response], dtype=torch.int64)
            input_ids[row, : len(tokens)] = tokens
        response_lengths = torch.tensor([len(r) for r in responses])
        mask = torch.arange(response_width) < response_lengths[:, None]
        for row, given in enumerate(masks or ()):
            mask[row, : len(given)] = torch.tensor(given, dtype=torch.bool)
        return Sequences(input_ids, torch.tensor([len(p) for p in prompts]), mask)


@dataclass(frozen=True)
class Rollouts:
    """A whole rollout: every sample that the generation engine returned for one step.

    Row b has the tokens of sample b. The rows of further conversations (`Episode.branches`) follow the last sample.

    Attributes:
        sequences: tokens and masks of the R rows.
        samples: [R] int64, the sample of each row.
        rollout_log_probs: [R, T] float32 as the engine reported them, 0 where masked.
        group_ids: [B] int64; samples of one prompt share a group.
        prompts: the prompt of each sample; length B. Episodes have the first prompt of their environment.
        completions: the completion of each sample; length B.
        versions: [R, T] int32, the version of the weights that sampled each token; anything where masked.
        weights_version: the newest of these versions.
        routed_experts: [R, S, L, K] int16 of the generation engine, -1 where nothing was recorded; or None.
    """

    sequences: Sequences
    samples: Tensor
    rollout_log_probs: Tensor
    group_ids: Tensor
    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]
    versions: Tensor
    weights_version: int
    routed_experts: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.completions)

    @property
    def own(self) -> Sequences:
        """The rows of the samples' own conversations, as wide as `sequences`."""
        rows, count = self.sequences, len(self)
        return Sequences(rows.input_ids[:count], rows.prompt_lengths[:count], rows.response_mask[:count])

    @staticmethod
    def collate(
        prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], pad: int, weights_version: int
    ) -> Rollouts:
        """Flatten `[prompt][sample]` completions into one batch; `group_ids` keep the groups.

        `weights_version` sampled the completions whose engine does not record versions.
        """
        flat = [c for group in completions for c in group]
        owners = [_owner(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
        group_ids = [g for g, group in enumerate(completions) for _ in group]
        branches = [(b, branch) for b, c in enumerate(flat) if c.episode is not None for branch in c.episode.branches]
        rows: list[Completion | EpisodeBranch] = [*flat, *(branch for _, branch in branches)]
        starts = [*(p.token_ids for p in owners), *(branch.prompt_ids for _, branch in branches)]
        masks = [() if c.episode is None else c.episode.mask for c in flat] + [branch.mask for _, branch in branches]
        sequences = Sequences.collate(starts, [row.token_ids for row in rows], pad, masks)
        samples = torch.tensor([*range(len(flat)), *(b for b, _ in branches)], dtype=torch.int64)
        log_probs = torch.zeros(sequences.response_mask.shape)
        for number, row in enumerate(rows):
            log_probs[number, : len(row.log_probs)] = torch.tensor(row.log_probs)
        routes = [c.routed_experts for c in flat if c.routed_experts is not None]
        experts = None
        if len(routes) == len(rows):
            experts = torch.full((*sequences.input_ids.shape, *routes[0].shape[1:]), -1, dtype=torch.int16)
            for row, route in enumerate(routes):
                experts[row, : len(route)] = route
        runs = [row.version_runs or ((weights_version, len(row.token_ids)),) for row in rows]
        versions, newest = _versions(runs, weights_version, log_probs.shape)
        groups = torch.tensor(group_ids)
        return Rollouts(*(sequences, samples, log_probs, groups, tuple(owners), tuple(flat), versions, newest), experts)


def _owner(prompt: Prompt, completion: Completion) -> Prompt:
    """Return the prompt of a response; an environment makes that of an episode."""
    episode = completion.episode
    return prompt if episode is None else replace(prompt, token_ids=episode.prompt_ids, text=episode.prompt_text)


def _versions(runs: Sequence[Sequence[tuple[int, int]]], default: int, shape: torch.Size) -> tuple[Tensor, int]:
    """Return the version [R, T] int32 of every token, and the newest one, from the runs of each row."""
    found = {version for of_sample in runs for version, _ in of_sample}
    if len(found) == 1:
        (version,) = found
        return torch.tensor(version, dtype=torch.int32).expand(shape), version
    versions = torch.full(shape, default, dtype=torch.int32)
    for row, of_sample in enumerate(runs):
        start = 0
        for version, count in of_sample:
            versions[row, start : start + count] = version
            start += count
    return versions, max(found, default=default)


@dataclass(frozen=True)
class TrainBatch:
    """The inputs of the policy loss for a whole rollout, a mini-batch or a micro-batch.

    Attributes:
        sequences: tokens and masks; `sequences.response_mask` is the loss mask, all false for a masked sample.
        sample_ids: [B] int64, the sample of each row in the rollout; logged if an update is skipped. Rows of one sample
            are in the same mini-batch.
        advantages: [B, T] float32.
        old_log_probs: [B, T] float32 of the old policy, the denominator of the ratio.
        rollout_log_probs: [B, T] float32 of the generation engine.
        ref_log_probs: [B, T] float32 of the frozen reference, or None.
        sample_weights: [B] float32 factors of the per-sample losses; None if all are 1.
        values: [B, T] float32 of the critic before its update, or None.
        returns: [B, T] float32, the targets of the critic, or None.
        routed_experts: [B, S, L, K] int16 that the routers replay (-1: choose freely), or None.
        policy_mask: [B, T] bool, the tokens of the loss mask that the policy loss sees; None if it sees all. The KL and
            entropy terms see all.
        length_quartiles: [B] int64, 0 to 3: the quartile of the rollout's response lengths; None if unknown.
        lag_buckets: [B, T] int8, the bucket of each token's staleness (`algorithms.staleness`); None if no token is
            stale.
    """

    sequences: Sequences
    sample_ids: Tensor
    advantages: Tensor
    old_log_probs: Tensor
    rollout_log_probs: Tensor
    ref_log_probs: Tensor | None = None
    sample_weights: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    routed_experts: Tensor | None = None
    policy_mask: Tensor | None = None
    length_quartiles: Tensor | None = None
    lag_buckets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool, the loss mask."""
        return self.sequences.response_mask

    @staticmethod
    def of_demonstrations(sequences: Sequences, sample_ids: Tensor) -> TrainBatch:
        """Return a batch of demonstrations for imitation; advantages and log-probs are 0."""
        zeros = torch.zeros(()).expand(sequences.response_mask.shape)
        return TrainBatch(sequences, sample_ids, zeros, zeros, zeros)

    def rows(self, index: Tensor) -> TrainBatch:
        """Return the samples of `index`, trimmed to their own maximum widths."""
        positions, width = self.sequences.trimmed_widths(index)
        widths = {"sample_weights": None, "length_quartiles": None, "routed_experts": positions}
        changes: dict[str, Any] = {
            "sequences": self.sequences.rows(index),
            "sample_ids": self.sample_ids[index],
        }
        for each in fields(self):
            tensor = self.__dict__[each.name]
            if each.name not in changes and tensor is not None:
                kept = widths.get(each.name, width)
                changes[each.name] = tensor[index] if kept is None else tensor[index, :kept]
        return replace(self, **changes)

    def split(self, size: int) -> list[TrainBatch]:
        """Split into consecutive batches of at most `size` samples."""
        return [self.rows(index) for index in torch.arange(len(self)).split(size)]

    def to(self, device: torch.device | str) -> TrainBatch:
        """Copy the batch to `device`."""
        s = self.sequences
        given = {each.name: self.__dict__[each.name] for each in fields(self) if each.name != "sequences"}
        names = [name for name, tensor in given.items() if tensor is not None]
        own = (s.input_ids, s.prompt_lengths, s.response_mask)
        copies = moved([*own, *(given[name] for name in names)], device)
        changes: dict[str, Any] = dict(zip(names, copies[len(own) :], strict=True))
        return replace(self, sequences=Sequences(*copies[: len(own)]), **changes)


def moved(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Return the tensors on `device`, with one copy per dtype for all that are elsewhere.

    Many small copies cost more than their bytes: each has a launch, and each copy to the host waits for the device.
    """
    target = torch.device(device)
    results = list(tensors)
    of_dtype: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type != target.type:
            of_dtype.setdefault(tensor.dtype, []).append(place)
    for places in of_dtype.values():
        flat = torch.cat([tensors[place].detach().flatten() for place in places])
        if target.type == "cuda":
            flat = flat.pin_memory()  # a copy from pageable memory waits for the device
        flat = flat.to(target, non_blocking=target.type == "cuda")
        for place, part in zip(places, flat.split([tensors[place].numel() for place in places]), strict=True):
            results[place] = part.view(tensors[place].shape)
    return results


def pad_rows(parts: Sequence[Tensor], width: int, fill: float = 0) -> Tensor:
    """Concatenate `[b_i, t_i, ...]` tensors into `[sum b_i, width, ...]`, padded on the right with `fill`."""
    padded = []
    for part in parts:
        rows = part.new_full((len(part), width, *part.shape[2:]), fill)
        rows[:, : part.shape[1]] = part
        padded.append(rows)
    return torch.cat(padded)
