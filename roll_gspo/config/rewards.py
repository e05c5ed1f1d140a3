"""Blocks of `rewards`: one worker, or a combination of several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, JsonValue, PositiveFloat, PositiveInt

from roll_gspo.config.base import Names, Problem, Schema, used_only_with
from roll_gspo.config.reward_table import SHIPPED_REWARDS, resolve_reward, shipped_name
from roll_gspo.config.selection import QueryFilterConfig

RewardWorker = Annotated[str, AfterValidator(resolve_reward)]


class RewardPart(Schema):
    """One of the rewards that a block combines. Parts cannot be nested."""

    worker_cls: RewardWorker
    """A shipped reward, or the dotted path of your own."""
    worker_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the worker."""
    weight: FiniteFloat | None = None
    """Factor of the part's score in a sum; null: 1. The gate itself and the parts of a `min` have no weight."""
    threshold: FiniteFloat | None = None
    """Minimum score to pass the gate, which is the first part of `combine: gate`; null: 1."""


class RewardConfig(Schema):
    """One reward domain. Its worker scores rows of this `domain` and rows with one of `tag_included`."""

    worker_cls: RewardWorker | None = None
    """A shipped reward such as `math_rule` (the page Rewards lists all), or the dotted path of your own
    `(prompt, response, ground_truth, **row)`. Set either this or `parts`."""
    worker_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the worker."""
    reward_type: Literal["soft", "hard", "loose", "strict"] | None = None
    """Argument of `ifeval` (`soft`: the share of followed instructions; `hard`: all or nothing), `crossthinkqa`
    (`loose`, `soft`, `strict`) or your own worker; null: the worker's default."""
    format_pattern: str | None = None
    """Argument of `format` or your own worker: a named form or a regular expression; null: the worker's default."""
    combine: Literal["weighted_sum", "gate", "min"] | None = None
    """Combination of the `parts` into one score. `weighted_sum` is the sum of weight × score. `gate` is that sum over
    all parts but the first if the first reaches its `threshold`. Otherwise it is `else_score`, and the other parts are
    not evaluated. `min` is the lowest score."""
    parts: dict[str, RewardPart] = Field(default_factory=dict)
    """Two or more rewards, keyed by a name of your choice. One process evaluates them in this order."""
    else_score: FiniteFloat = 0.0
    """Score of samples that do not pass the gate of `combine: gate`."""
    judge_model_type: Literal["api", "inference"] | None = None
    """ROLL's name for the location of the `llm_judge` model: `api` is an endpoint (`judge_api_url`), `inference` a vLLM
    server that the run starts (`worker_args.engine`)."""
    judge_model_name: str | None = None
    """ROLL's name of `worker_args.model` (of `worker_args.engine.model` with `judge_model_type: inference`)."""
    judge_api_url: str | None = None
    """ROLL's name of `worker_args.base_url`."""
    judge_prompt: str | None = None
    """ROLL's name of `worker_args.prompt`: a template or the path of one."""
    tag_included: Names = ()
    """Tags of data rows that belong to this domain, in addition to rows whose domain is the name of this block."""
    world_size: PositiveInt | None = None
    """Worker processes; null: half the CPU cores, at most 8."""
    infer_batch_size: PositiveInt = 16
    """Maximum samples per request to a worker. A worker with `score_batch` scores them together. An error of one sample
    fails only that sample, also in batches. A wrong number of scores fails the whole batch."""
    timeout_s: PositiveFloat = 10.0
    """Time limit per sample in seconds, over all parts. After it, the sample is marked failed and its worker replaced.
    If omitted, the limit is 330 with an `llm_judge` and 120 with a `reward_model`. A batch of n samples has n times the
    limit. If it exceeds that, each of its samples is scored again alone."""
    start_timeout_s: PositiveFloat = 120.0
    """Time limit in seconds for the start of a worker process, including the model that it loads."""
    max_memory_mb: PositiveInt | None = None
    """Memory limit of a worker process in MiB (including libraries, excluding code). A sample that needs more fails.
    null: no limit. If the machine runs out of memory, the kernel kills a worker before the training process."""
    query_filter_config: QueryFilterConfig | None = None
    """Query filter of this domain for dynamic sampling; null: the top-level `query_filter_config`."""

    @property
    def num_workers(self) -> int:
        """Number of worker processes: `world_size`, or its default on this machine."""
        return self.world_size or max(1, min(8, len(os.sched_getaffinity(0)) // 2))

    @property
    def workers(self) -> dict[str, str]:
        """Workers of the block by key path."""
        single = {"worker_cls": self.worker_cls} if self.worker_cls is not None else {}
        return single | {f"parts.{name}.worker_cls": part.worker_cls for name, part in self.parts.items()}

    @property
    def arguments(self) -> dict[str, JsonValue]:
        """Keyword arguments of the worker: `worker_args` and the block keys that are arguments."""
        named = {key: value for key, value in self._named_arguments.items() if value is not None}
        return self.worker_args | self._judge_arguments | named

    @property
    def title(self) -> str:
        """Name of the worker, or the combination with its parts, for the plan."""
        parts = ", ".join(f"{name} {part.worker_cls}" for name, part in self.parts.items())
        return self.worker_cls or f"{self.combine} of {parts}"

    @classmethod
    def fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in `timeout_s` with the longest of the shipped rewards that the block names."""
        values = super().fill_defaults(values)
        if "timeout_s" in values:
            return values
        parts = values.get("parts")
        blocks = [values, *(parts.values() if isinstance(parts, Mapping) else ())]
        names = {shipped_name(str(block.get("worker_cls"))) for block in blocks if isinstance(block, Mapping)}
        timeouts = [r.timeout_s for name, r in SHIPPED_REWARDS.items() if name in names and r.timeout_s is not None]
        return {**values, "timeout_s": max(timeouts)} if timeouts else values

    def broken_rules(self) -> Iterator[Problem]:
        """Yield a missing or ambiguous worker, wrong parts, and keys without effect."""
        yield from super().broken_rules()
        if self.worker_cls is None and not self.parts:
            yield Problem("worker_cls", "missing; name a worker, or give parts and combine", ("parts",))
        elif self.worker_cls is not None and self.parts:
            message = f"replace worker_cls, which is '{self.worker_cls}'; set one of them to null"
            yield Problem("parts", message, ("worker_cls",))
        elif self.parts:
            yield from self._rules_of_parts()
        elif self.combine is not None:
            yield Problem("combine", f"{self.combine} needs parts; add them, or remove this key", ("parts",))
        if self.else_score and self.combine != "gate":
            yield used_only_with("else_score", "combine", "gate")
        yield from self._rules_of_deadlines()
        yield from self._rules_of_judge()
        yield from self._rules_of_named_arguments()

    def _rules_of_parts(self) -> Iterator[Problem]:
        names = list(self.parts)
        if self.worker_args:
            message = "belong to worker_cls, which is not set; write those of a part in parts.NAME.worker_args"
            yield Problem("worker_args", message)
        if self.combine is None:
            yield Problem("combine", "missing; choose weighted_sum, gate or min", ("parts",))
            return
        if len(names) < 2:
            message = f"'{names[0]}' is the only part; add another, or write its worker_cls in the block itself"
            yield Problem("parts", message)
        for name, part in self.parts.items():
            is_gate = self.combine == "gate" and name == names[0]
            if "/" in name:
                message = f"'{name}' has a slash, which separates a part from its components in metrics; rename it"
                yield Problem("parts", message)
            if part.threshold is not None and not is_gate:
                message = "is used only in the first part of combine: gate; remove it"
                yield Problem(f"parts.{name}.threshold", message, ("combine",))
            if part.weight is not None and (is_gate or self.combine == "min"):
                what = "the gate of combine: gate" if is_gate else "combine: min"
                yield Problem(f"parts.{name}.weight", f"{what} has no weights; remove it", ("combine",))

    def _rules_of_deadlines(self) -> Iterator[Problem]:
        blocks = {"": (self.worker_cls, self.worker_args)}
        blocks |= {f"parts.{name}.": (part.worker_cls, part.worker_args) for name, part in self.parts.items()}
        for path, (worker, arguments) in blocks.items():
            deadline = arguments.get("deadline_s")
            if worker == "llm_judge" and isinstance(deadline, int | float) and deadline >= self.timeout_s:
                yield Problem(
                    f"{path}worker_args.deadline_s",
                    f"{deadline:g} is not below timeout_s {self.timeout_s:g}, so the worker would be killed before the "
                    "judge gives up; raise timeout_s",
                    ("timeout_s",),
                )

    def _rules_of_judge(self) -> Iterator[Problem]:
        keys = {
            "judge_model_type": self.judge_model_type,
            "judge_model_name": self.judge_model_name,
            "judge_api_url": self.judge_api_url,
            "judge_prompt": self.judge_prompt,
        }
        given = [key for key, value in keys.items() if value is not None]
        if not given:
            return
        if self.worker_cls != "llm_judge":
            message = "is used only with worker_cls: llm_judge (in a part, write its worker_args); remove it"
            yield Problem(given[0], message, ("worker_cls",))
            return
        if self.judge_model_type == "inference" and self.judge_model_name is None:
            message = "inference needs the model to run; name it in judge_model_name"
            yield Problem("judge_model_type", message, ("judge_model_name",))
        if self.judge_model_type == "inference" and self.judge_api_url is not None:
            message = "has no effect with judge_model_type: inference; remove it, or set judge_model_type: api"
            yield Problem("judge_api_url", message, ("judge_model_type",))
        if both := sorted(self.worker_args.keys() & self._judge_arguments.keys()):
            message = "and ROLL's key for it (judge_*) are both set; remove one of them"
            yield Problem(f"worker_args.{both[0]}", message, tuple(given))

    def _rules_of_named_arguments(self) -> Iterator[Problem]:
        worker = self.worker_cls
        block_arguments = SHIPPED_REWARDS[worker].block_arguments if worker in SHIPPED_REWARDS else {}
        for key, value in self._named_arguments.items():
            if value is None:
                continue
            allowed = block_arguments.get(key, ())
            if worker is None:
                message = f"'{value}' belongs to worker_cls, which is not set; write it in parts.NAME.worker_args"
                yield Problem(key, message)
            elif worker in SHIPPED_REWARDS and key not in block_arguments:
                takers = " or ".join(name for name, r in SHIPPED_REWARDS.items() if key in r.block_arguments)
                message = f"'{value}' is used only with worker_cls: {takers}, and this is {worker}; remove it"
                yield Problem(key, message, ("worker_cls",))
            elif key in self.worker_args:
                message = f"'{value}' and worker_args.{key} are both set; remove one of them"
                yield Problem(key, message, (f"worker_args.{key}",))
            if allowed and value not in allowed:
                message = f"'{value}' is unknown to {worker}; choose one of {', '.join(allowed)}"
                yield Problem(key, message, ("worker_cls",))

    @property
    def _named_arguments(self) -> dict[str, str | None]:
        return {"reward_type": self.reward_type, "format_pattern": self.format_pattern}

    @property
    def _judge_arguments(self) -> dict[str, JsonValue]:
        inference = self.judge_model_type == "inference"
        named: dict[str, JsonValue] = {
            "engine": {"model": self.judge_model_name} if inference else None,
            "model": None if inference else self.judge_model_name,
            "base_url": self.judge_api_url,
            "prompt": self.judge_prompt,
        }
        return {key: value for key, value in named.items() if value is not None}
