"""Shared readers of `data_args` blocks: shipped tasks, chat templates, the fingerprint of the data."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from roll_gspo.config.data import DataArgs, SourceArgs
from roll_gspo.config.environment_table import SEEDS
from roll_gspo.config.run import RunConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.data import column_addition, multi_domain
from roll_gspo.data.templates import NATIVE, ChatFormat
from roll_gspo.errors import DataError

BUILTIN = "builtin:"
TASKS = (column_addition.FILE_NAME, multi_domain.FILE_NAME, SEEDS)
NUM_GENERATED_ROWS = {"train": 4096, "validation": 256}  # of generated tasks without num_rows
DATA_SEED = 0  # generated rows are the same for every seed of a comparison


def builtin_task(args: SourceArgs, where: str) -> str | None:
    """Return the shipped task that `file_name` names, None if it names files.

    Raises:
        DataError: the task does not exist, or `file_name` also names files.
    """
    if not any(name.startswith(BUILTIN) for name in args.file_name):
        return None
    name, *others = args.file_name
    if others or name not in TASKS:
        raise DataError(
            f"{where}: {', '.join(args.file_name)}: the shipped tasks are {', '.join(TASKS)}, and no file can be "
            "named beside one; name one of them, or files"
        )
    return name


def check_tags(config: RunConfig, tags: set[str]) -> None:
    """Check that `tag_to_template` names tags of the data.

    Raises:
        DataError: `tag_to_template` names a tag that no row has.
    """
    if unknown := [tag for tag in config.tag_to_template if tag not in tags]:
        raise DataError(
            f"tag_to_template: no row has the tag {', '.join(unknown)} (tags of the data: "
            f"{', '.join(sorted(tags - {''})) or 'none'}); write it as in the data, or remove it"
        )


def chat_format(config: AnyConfig, args: SourceArgs) -> ChatFormat:
    """Return template and system prompts of a `data_args` block. Validation defaults to the template of training."""
    own = args.template or config.actor_train.data_args.template or NATIVE
    by_domain = args.domain_system_prompts if isinstance(args, DataArgs) else {}
    return ChatFormat(config.global_template or own, config.tag_to_template, args.system_prompt, by_domain)


def fingerprint(token_ids: Iterable[Sequence[int]]) -> str:
    """Return a hash of all tokens in order. It does not depend on the location of the files."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in token_ids:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(array("q", ids).tobytes())
    return digest.hexdigest()
