"""Evaluation without training: generate, score, and write a table of metrics and the samples."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import roll_gspo
from roll_gspo.algorithms.interval import Estimate
from roll_gspo.batch import Prompt, Rollouts
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.data.rendering import response_text
from roll_gspo.data.rows import DataRow
from roll_gspo.errors import RewardError
from roll_gspo.pipelines.components import check_token_ids, load_tokenizer, stop_ids
from roll_gspo.pipelines.evaluated import REPORT, Evaluated
from roll_gspo.pipelines.factories import make_evaluated
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.rlvr.build import new_validation, validation_generator
from roll_gspo.pipelines.rlvr.datasets import columns_of, tokenize, validation_rows
from roll_gspo.pipelines.rlvr.episode_managers import episode_manager
from roll_gspo.pipelines.rlvr.sample_files import validation_samples
from roll_gspo.pipelines.rlvr.validation import Answers, ScoredBatch, Summary, answers_of, summaries
from roll_gspo.pipelines.run_folder import config_yaml, make_folder
from roll_gspo.rewards.base import RewardResult
from roll_gspo.rewards.routing import Router
from roll_gspo.roles.reward_manager import RewardManager
from roll_gspo.roles.scorer import Scorer
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.rollouts import RolloutWriter
from roll_gspo.tracking.token_texts import TokenTexts

TABLE, SAMPLES = "evaluation.md", "validation"


def evaluate(config: ExperimentConfig, evaluated: Evaluated) -> list[Summary]:
    """Sample and score the validation prompts; write table, metrics and samples into `evaluated.out`.

    Returns:
        The metrics of every group, then of all prompts.

    Raises:
        DataError, ConfigError: the data, the model or a reward cannot be used.
        RewardError: no sample could be scored.
    """
    make_folder(evaluated.out, "out")
    (evaluated.out / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
    started = time.perf_counter()
    with Console("evaluation", 1, evaluated.out) as console:
        assert config.validation is not None  # the plan rejects a missing block
        with console.stage("read data"):
            rows = validation_rows(config)
        with console.stage("start rewards"):
            scorer = _scorer(config, rows)
        try:
            answers, failures = _sample(config, evaluated, rows, scorer, console)
        finally:
            scorer.close()
        figures = summaries(answers, config.validation)
        document = _document(config, evaluated, figures, time.perf_counter() - started)
        _write(evaluated.out / REPORT, json.dumps(_finite(document), indent=1, ensure_ascii=False) + "\n")
        _write(evaluated.out / TABLE, f"# {evaluated.model}\n\n{table(figures)}\n")
        if failures:
            console.warning(f"{figures[-1].num_failed} rewards failed and are left out, the first: {failures[0]}")
    if not figures[-1].num_scored:
        raise RewardError(f"no reward could be computed, the first failed so: {failures[0]}")
    return figures


def _scorer(config: ExperimentConfig, rows: Sequence[DataRow]) -> Scorer:
    """Build what gives the rewards, with only the reward blocks that these rows need."""
    columns = [columns_of(config, row) for row in rows]
    if config.plays_episodes:
        scorer: Scorer = episode_manager(config)
    else:
        router = Router(config.domain_tags)
        router.check(columns)
        used = {router.domain_of(row) for row in columns}
        scorer = RewardManager({domain: block for domain, block in config.rewards.items() if domain in used})
    try:
        scorer.check(columns)
    except BaseException:
        scorer.close()
        raise
    return scorer


def _sample(
    config: ExperimentConfig, evaluated: Evaluated, rows: list[DataRow], scorer: Scorer, console: Console
) -> tuple[list[Answers], list[str]]:
    """Return the samples of every prompt, and the reasons of failed rewards."""
    assert config.validation is not None
    checkpoint = prepare_checkpoint(config, evaluated.model, console, evaluated.key)
    with console.stage("tokenize prompts"):
        tokenizer = load_tokenizer(checkpoint)
        block = config.validation.data_args
        prompts = tokenize(config, block, rows, tokenizer, config.validation_prompt_length)
        check_token_ids((prompt.token_ids for prompt in prompts), tokenizer, checkpoint)
    stops = stop_ids(config, [block], tokenizer, checkpoint)
    validation = new_validation(config, prompts, stops, scorer)
    with console.stage("start actor_infer"):
        generator = make_evaluated(config, checkpoint, tokenizer.pad_token_id)
        generator.weights_version = evaluated.step
    answers: list[Answers] = []
    failures: list[str] = []

    def score(rollouts: Rollouts) -> list[RewardResult]:
        return scorer.score(rollouts, [response_text(tokenizer, c.token_ids, stops) for c in rollouts.completions])

    def batches() -> Iterator[ScoredBatch]:
        with console.stage("evaluate") as progress:
            sampled = validation_generator(config, generator, scorer, tokenizer, stops)
            for batch in validation.scored(sampled, score, progress):
                answers.extend(answers_of(batch, validation.config.group_by))
                failures.extend(result.failed for result in batch.results if result.failed is not None)
                yield batch

    writer = RolloutWriter(evaluated.out / SAMPLES)
    try:
        writer.write(evaluated.step, validation_samples(batches(), TokenTexts(lambda ids: tokenizer.decode(list(ids)))))
        writer.flush()
    finally:
        writer.close()
        generator.close()
    _warn_of_dropped_prompts(rows, prompts, console)
    return answers, failures


def _warn_of_dropped_prompts(rows: Sequence[DataRow], prompts: Sequence[Prompt], console: Console) -> None:
    """Warn if long prompts were dropped, because the result is not comparable to the full benchmark."""
    if len(prompts) < len(rows):
        console.warning(
            f"{len(rows) - len(prompts)} of {len(rows)} prompts were too long and are not in these metrics; raise "
            "val_prompt_length"
        )


def _document(config: ExperimentConfig, evaluated: Evaluated, figures: Sequence[Summary], seconds: float) -> Any:
    assert config.validation is not None
    return {
        "model": evaluated.model,
        "step": evaluated.step,
        "validation": config.validation.model_dump(mode="json"),
        "prompt_length": config.validation_prompt_length,
        "response_length": config.validation_response_length,
        "seed": config.seed,
        "engine": config.actor_infer.strategy_args.strategy_name,
        "version": roll_gspo.__version__,
        "seconds": seconds,
        "figures": [
            {
                "group": s.group,
                "num_prompts": s.num_prompts,
                "num_scored": s.num_scored,
                "num_failed": s.num_failed,
                "response_length_mean": s.response_length_mean,
                "truncated_fraction": s.truncated_fraction,
                **{name: figure._asdict() for name, figure in s.estimates.items()},
            }
            for s in figures
        ],
    }


def _finite(value: Any) -> Any:
    """Replace non-finite floats by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Write the file atomically."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def table(figures: Sequence[Summary]) -> str:
    """Return the metrics as an aligned Markdown table; — marks values that are not available."""
    names = list(dict.fromkeys(name for summary in figures for name in summary.estimates))
    head = ["group", "prompts", *(f"{n} [95 %]" if n.startswith("avg") else n for n in names)]
    head += ["length", "truncated", "failed"]
    lines = [head, *(_row(summary, names) for summary in figures)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def _row(summary: Summary, names: Sequence[str]) -> list[str]:
    figures = [_cell(name, summary.estimates[name]) if name in summary.estimates else "—" for name in names]
    length, truncated = f"{summary.response_length_mean:.1f}", f"{summary.truncated_fraction:.1%}"
    return [summary.group, str(summary.num_prompts), *figures, length, truncated, str(summary.num_failed)]


def _cell(name: str, figure: Estimate) -> str:
    if not name.startswith("avg"):
        return f"{figure.mean:.4f}"
    return f"{figure.mean:.4f} [{figure.low:.4f}, {figure.high:.4f}]"
