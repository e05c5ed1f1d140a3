"""The prompts of a run, from configured files or a generated task, and the order in which they are drawn."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roll_gspo.batch import Prompt
from roll_gspo.config.data import DataArgs
from roll_gspo.config.environment_table import SEEDS
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.validation import ValidationConfig
from roll_gspo.data import column_addition, multi_domain
from roll_gspo.data.messages import Columns
from roll_gspo.data.prompts import make_prompts
from roll_gspo.data.rows import DataRow, ReadOptions, read_rows
from roll_gspo.data.sampler import InterleavedSampler, PromptSampler, Sampler
from roll_gspo.errors import DataError
from roll_gspo.pipelines.data_sources import (
    DATA_SEED,
    NUM_GENERATED_ROWS,
    builtin_task,
    chat_format,
    check_tags,
    fingerprint,
)
from roll_gspo.rewards.routing import Router

UNLABELLED = "unlabelled"
SHARES = "actor_train.data_args.domain_interleave_probs"


@dataclass(frozen=True)
class Datasets:
    """Training and validation rows before tokenization."""

    train: list[DataRow]
    validation: list[DataRow]


def read_datasets(config: ExperimentConfig) -> Datasets:
    """Read (or generate) training and validation rows.

    Raises:
        DataError: names the YAML key, the file and the line.
    """
    args, where = config.actor_train.data_args, "actor_train.data_args.file_name"
    train = seed_rows(config, "train") if args.file_name == (SEEDS,) else _rows(args, where, "train")
    validation = [] if config.validation is None else validation_rows(config)
    if config.difficulty_loss_weight:
        _check_difficulty(train)
    check_tags(config, {row.tag for row in (*train, *validation)})
    shares = config.domain_shares
    if shares is not None:
        check_shares(shares, domains_of(config, [_labels(row) for row in train]), "the data")
    return Datasets(train, validation)


def _labels(row: DataRow) -> dict[str, str]:
    return {"id": row.id, "domain": row.domain, "tag": row.tag}


def domains_of(config: ExperimentConfig, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the domain of each row: the block of `rewards` or `custom_envs`.

    Args:
        rows: rows with `id`, `domain` and `tag`.

    Raises:
        DataError: a row has none.
    """
    router = Router(config.domain_tags, "custom_envs" if config.plays_episodes else "rewards")
    router.check(rows)
    return [router.domain_of(row) for row in rows]


def check_shares(shares: Mapping[str, float], domains: Sequence[str], data: str) -> None:
    """Check that shares and data name the same domains.

    Args:
        shares: configured share of each domain.
        domains: domain of each row.
        data: name of the data in error messages.

    Raises:
        DataError: a domain of the data has no share, or one with a share has no row.
    """
    counts = Counter(domains)
    without_share = [name for name in counts if name not in shares]
    without_rows = [name for name in shares if name not in counts]
    if not without_share and not without_rows:
        return
    wrong = [f"it does not name {', '.join(without_share)}"] if without_share else []
    wrong += [f"{data} has no row of {', '.join(without_rows)}"] if without_rows else []
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    raise DataError(
        f"{SHARES}: {', and '.join(wrong)} (rows of {data}: {listed}; shares: {', '.join(shares) or 'none'}); name "
        "the domains of the data and no others, with 0 for those to leave out"
    )


def make_sampler(config: ExperimentConfig, prompts: Sequence[Prompt]) -> Sampler[Prompt]:
    """Build the sampler of training prompts: by domain shares, or from one shuffled list.

    Raises:
        DataError: all prompts of a domain with a share were too long.
    """
    marks = (list(json.dumps(p.row, default=str).encode()) if config.plays_episodes else p.token_ids for p in prompts)
    mark = fingerprint(marks)
    shares = config.domain_shares
    if shares is None:
        return PromptSampler(prompts, config.seed, mark)
    domains = domains_of(config, [prompt.row for prompt in prompts])
    check_shares(shares, domains, f"the data within prompt_length {config.prompt_length}")
    by_domain: dict[str, list[Prompt]] = {name: [] for name in shares}
    for prompt, domain in zip(prompts, domains, strict=True):
        by_domain[domain].append(prompt)
    return InterleavedSampler(by_domain, shares, config.seed, mark)


def validation_rows(config: ExperimentConfig) -> list[DataRow]:
    """Return the rows of the block `validation`, which must exist: those of its data, or seeds.

    Raises:
        DataError: see `read_validation` and `seed_rows`.
    """
    block = config.validation
    assert block is not None
    return seed_rows(config, "validation") if block.data_args.file_name == (SEEDS,) else read_validation(block)


def read_validation(block: ValidationConfig) -> list[DataRow]:
    """Read the validation rows; only those of `sources` if the block sets it.

    Raises:
        DataError: names the YAML key, the file and the line; or a source that no row has.
    """
    args, where = block.data_args, "validation.data_args.file_name"
    if not block.sources:
        return _rows(args, where, "validation")
    rows = _rows(args.model_copy(update={"num_rows": None}), where, "validation")  # `num_rows` applies after filtering
    labels = [group_of({**row.extra, "domain": row.domain, "tag": row.tag}, block.group_by) for row in rows]
    if unknown := [name for name in block.sources if name not in labels]:
        raise DataError(
            f"validation.sources: no row has the {block.group_by} {', '.join(unknown)} (there are "
            f"{', '.join(dict.fromkeys(labels))}); write it as there, or leave it out"
        )
    return [row for row, label in zip(rows, labels, strict=True) if label in block.sources][: args.num_rows]


def group_of(row: Mapping[str, Any], group_by: str) -> str:
    """Return the validation group of a row."""
    columns = ("source", "tag", "domain") if group_by == "source" else (group_by,)
    return next((str(row[name]) for name in columns if row.get(name)), UNLABELLED)


def _check_difficulty(rows: list[DataRow]) -> None:
    """Check that every row has a difficulty from 0 (easy) to 1 (hard), as a number or numeric string."""
    for row in rows:
        try:
            usable = math.isfinite(float(row.extra["difficulty"]))
        except (KeyError, TypeError, ValueError):
            usable = False
        if not usable:
            raise DataError(
                f"difficulty_loss_weight: the row '{row.id}' has the difficulty {row.extra.get('difficulty')!r}; give "
                "every row a number from 0 to 1, or set difficulty_loss_weight: false"
            )


def tokenize(
    config: ExperimentConfig, args: DataArgs, rows: list[DataRow], tokenizer: Any, prompt_length: int
) -> tuple[Prompt, ...]:
    """Tokenize rows and drop prompts longer than `prompt_length`.

    Raises:
        DataError: the chat template cannot be used, or no prompt fits.
    """
    if config.plays_episodes:
        # Environments write the prompts. A sample keeps the placeholder if its environment fails, and is masked.
        end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return tuple(Prompt((end,), "", columns_of(config, row)) for row in rows)
    domains = domains_of(config, [_labels(row) for row in rows])
    where, chat = ", ".join(args.file_name), chat_format(config, args)
    return make_prompts(rows, tokenizer, prompt_length, where, chat, domains)


def columns_of(config: ExperimentConfig, row: DataRow) -> dict[str, Any]:
    """Return the columns that rewards or environments receive. Environments also read messages and tools."""
    if not config.plays_episodes:
        return row.columns
    given: dict[str, Any] = {"messages": list(row.messages)} if row.messages else {}
    given |= {"tools": list(row.tools)} if row.tools else {}
    return row.columns | given


def seed_rows(config: ExperimentConfig, split: str) -> list[DataRow]:
    """Return rows of `builtin:seeds`. Even seeds are for training, odd ones for validation.

    Raises:
        DataError: the run has no environment that reads them.
    """
    is_training = split == "train"
    manager = config.train_env_manager if is_training else config.val_env_manager or config.train_env_manager
    if manager is None:
        raise DataError(f"{SEEDS}: only environments read seeds; add custom_envs and train_env_manager, or name files")
    block = config.actor_train if is_training else config.validation
    assert block is not None
    tags = manager.tags or tuple(config.custom_envs) or tuple(config.domain_tags)
    number = block.data_args.num_rows or NUM_GENERATED_ROWS[split]
    counts = [len(range(i, number, len(tags))) for i in range(len(tags))]
    if not is_training and manager is config.val_env_manager and manager.num_groups_partition is not None:
        counts = list(manager.num_groups_partition)
    seeds = ((tag, 2 * i + (not is_training)) for tag, count in zip(tags, counts, strict=True) for i in range(count))
    return [DataRow(f"{tag}/{seed}", (), "", tag, extra={"seed": seed, "source": tag}) for tag, seed in seeds]


def _rows(args: DataArgs, where: str, split: str) -> list[DataRow]:
    task = builtin_task(args, where)
    if task == multi_domain.FILE_NAME:
        return multi_domain.rows(split)[: args.num_rows]
    if task == column_addition.FILE_NAME:
        return column_addition.rows(args.num_rows or NUM_GENERATED_ROWS[split], DATA_SEED, split)
    columns = Columns(args.messages, args.prompt, args.ground_truth, args.tag)
    domains = dict.fromkeys(args.file_name, args.domain or "") | args.file_domains
    reading = ReadOptions(columns, args.dataset_config, args.split, domains, args.drop_last_answer)
    return read_rows(args.file_name, where, args.on_bad_row, reading)[: args.num_rows]
