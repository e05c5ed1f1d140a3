"""The response of an episode that an agent has played: the conversation of the last reward, with all rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from roll_gspo.batch import Completion
from roll_gspo.data.turns import TokenRecord
from roll_gspo.episode import Episode, EpisodeBranch, EpisodeTurn
from roll_gspo.roles.agents.conversation import AgentTurn, Branch, Conversations
from roll_gspo.roles.agents.protocol import RewardPost
from roll_gspo.roles.episodes import DONE, FAILED


@dataclass(frozen=True)
class Credit:
    """A reward, and the number of answers that the model had given before."""

    num_answers: int
    post: RewardPost


@dataclass(frozen=True)
class Ending:
    """Why an episode ended.

    Attributes:
        reason: `done`, `max_turns`, `max_tokens` or `failed`.
        failure: why it failed, or None.
        errors: last lines that the program wrote to stderr; empty unless it failed.
    """

    reason: str
    failure: str | None = None
    errors: str = ""

    @staticmethod
    def failed(failure: str, errors: str = "") -> Ending:
        """Return the end of an episode without reward."""
        return Ending(FAILED, failure, errors)


def episode_completion(
    conversations: Conversations,
    credits: Sequence[Credit],
    ending: Ending,
    row_prompt: tuple[int, ...],
    format_penalty: float = 0.0,
) -> Completion:
    """Return the conversation that the last reward is about, with the others as `Episode.branches`.

    A reward belongs to the last answer before it in this conversation, or else to the first one.

    Args:
        conversations: what the model was asked and answered.
        credits: the rewards.
        ending: why the episode ended.
        row_prompt: tokens of the row, for an episode in which the model was not asked.
        format_penalty: reward of every answer with calls that cannot be read.
    """
    main = _main(conversations, credits)
    invalid = [turn.number for branch in conversations.branches for turn in branch.turns if turn.invalid]
    penalties = [Credit(number + 1, RewardPost(reward=format_penalty)) for number in invalid]
    record = TokenRecord(row_prompt) if main is None else main.record
    turns = [] if main is None else main.turns
    summary = Episode(
        prompt_ids=record.prompt_ids,
        prompt_text=conversations.text_of(record.prompt_ids),
        mask=tuple(record.mask),
        turn_ends=tuple(record.turn_ends),
        turns=_rewarded(turns, [*credits, *penalties]),
        end=ending.reason,
        failed=ending.failure,
        traceback=ending.errors,
        num_rewritten=0 if main is None else main.num_rewritten,
        branches=tuple(_branch(other) for other in conversations.branches if other is not main),
    )
    return Completion(
        tuple(record.token_ids),
        tuple(record.log_probs),
        "stop" if ending.reason == DONE else "length",
        version_runs=tuple(record.version_runs),
        episode=summary,
    )


def partial_completion(conversations: Conversations) -> Completion:
    """Return the tokens of an unfinished episode, up to its last answer."""
    if not conversations.num_answers:
        return Completion((), (), "partial")
    record = conversations.branch_of(conversations.num_answers - 1).record
    return Completion(
        tuple(record.token_ids), tuple(record.log_probs), "partial", version_runs=tuple(record.version_runs)
    )


def _main(conversations: Conversations, credits: Sequence[Credit]) -> Branch | None:
    """Return the branch with the last answer before the last reward, or the last answer of all."""
    if not conversations.num_answers:
        return None
    number = credits[-1].num_answers if credits else conversations.num_answers
    return conversations.branch_of(max(0, number - 1))


def _rewarded(turns: Sequence[AgentTurn], credits: Sequence[Credit]) -> tuple[EpisodeTurn, ...]:
    found = [_Rewarded() for _ in turns]
    for credit in credits:
        before = [place for place, turn in enumerate(turns) if turn.number < credit.num_answers]
        if found:
            found[before[-1] if before else 0].add(credit.post)
    return tuple(
        EpisodeTurn(turn.answer, turn.following, rewarded.reward, turn.invalid, rewarded.metrics)
        for turn, rewarded in zip(turns, found, strict=True)
    )


@dataclass
class _Rewarded:
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, post: RewardPost) -> None:
        self.reward += post.reward
        self.metrics |= post.metrics


def _branch(branch: Branch) -> EpisodeBranch:
    record = branch.record
    return EpisodeBranch(
        record.prompt_ids,
        tuple(record.token_ids),
        tuple(record.log_probs),
        tuple(record.mask),
        tuple(record.turn_ends),
        _rewarded(branch.turns, ()),
        tuple(record.version_runs),
    )
