"""Prints docs/configuration.md from the schema: `python -m roll_gspo.config.reference > docs/configuration.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from roll_gspo.config.algorithm import AlgorithmConfig
from roll_gspo.config.blocks import models_in
from roll_gspo.config.experiment import BatchConfig, ExperimentConfig, RunConfig
from roll_gspo.config.legacy import IGNORED, IGNORED_WITHOUT, LATER_VALUES, NOT_SUPPORTED_YET, ROLES, reader_text
from roll_gspo.config.sft import SftConfig

INTRO = """\
# Configuration

<!-- Printed from the schema by `python -m roll_gspo.config.reference > docs/configuration.md`; edit that instead. -->

One YAML file says everything a run does. Hydra composes it, pydantic checks it once, and nothing changes it
afterwards. Key names are [ROLL](https://github.com/alibaba/ROLL)'s wherever ROLL has the key.

## How a configuration comes about

```bash
python -m roll_gspo.run --config-name example_gspo                             # a shipped file
python -m roll_gspo.run --config-name example_gspo max_steps=10                # key=value changes one key
python -m roll_gspo.run --config-name example_gspo importance_sampling=token   # group=option switches several
python -m roll_gspo.run --config-name example_gspo algorithm=dapo              # a preset switches the whole algorithm
python -m roll_gspo.run --config-name mine --config-dir my_configs             # a file of yours
```

* **Groups.** Each folder in `conf/` is a group, each file in it an option: a few keys that belong together.
  `importance_sampling=token` sets the level of the ratio and the clip range that fits it. A file chooses its options
  in `defaults:`, the command line replaces them. The axes of the algorithm are `adv_estimator`,
  `importance_sampling`, `policy_loss`, `loss_agg_mode`, `reward_norm`, `kl`, `query_filter` (dynamic sampling),
  `train_infer_correction`, `old_log_probs` and `router_replay`; the rest are `strategy` (engines), `model` (with its
  sizes), `data` and `validation` (each with its rewards) and `tracker`. `layout` (devices and parallel sizes) follows
  from model and strategy, and `layout=single` gives each role one rank. `none` is the option that switches an axis off.
* **Presets.** An option of the group `algorithm` is a published method: an option on each axis, and the keys that are
  left. There are `gspo`, `gspo_paper`, `gspo_token`, `grpo`, `dr_grpo`, `dapo`, `ppo`, `rloo`, `reinforce_plus_plus`,
  `raft_plus_plus`, `topr`, `cispo`, `gmpo`, `sapo` and `luspo`. Every axis can still be named beside it:
  `algorithm=dapo importance_sampling=seq` is DAPO with the ratio of GSPO, and its clip range. For that, what belongs
  to a combination of choices (DAPO's clip range to DAPO with single tokens clipped) has a file of its own in
  `combination`, which nobody chooses by name.
* **Your own file** derives from a shipped one and says only what differs:

  ```yaml
  # my_configs/mine.yaml
  defaults:
    - example_gspo
    - override model: tiny_qwen3_moe
    - _self_

  exp_name: mine
  kl_loss_coef: 0.01
  ```

* **Precedence**, the last one wins: the schema's defaults, the options in the order of `defaults:`, the body of the
  file (`_self_`), the command line. Where a body repeats a key that a group chooses, the group would be chosen in
  vain; this is refused, with the line to remove. An axis that a file's `defaults:` choose wins over `algorithm=NAME`.
* **A flat file**, as ROLL's are, has no `defaults:`. It works as it is. To switch a group on its command line, write
  `+group=option`: there is no option yet that `group=option` could replace. Plain keys never need a `+`.
* **Look before you run**: `--cfg job` prints the composed configuration, `--dry-run` checks it and prints the plan.
* **Pipelines**: `pipeline: sft` ([supervised fine-tuning](sft.md), `defaults: [base_sft]`) has the keys of the run and
  its own, with the groups `strategy`, `model`, `layout`, `data` and `tracker`. What only `rlvr` reads of their options
  is left aside; in a file of yours or on the command line it is refused.
* **Several runs**: `--multirun seed=0,1,2 algorithm=gspo,grpo` makes one run of each combination, each in
  a process of its own.

A wrong configuration ends the command with exit code 2 before any engine is imported. All problems come together, each
with file and line (or the override), key, what is wrong, and what to do.

YAML has its own ideas of some values: in a file, `on`, `off`, `yes` and `no` are booleans and `010` is 8; an unquoted
`2024` is a number where a name was meant (write `"2024"`). `1e-6` is read as a number here. `null` unsets a key.
`${other.key}` is the value of another key, `${oc.env:NAME,default}` that of an environment variable.

Types are not converted: an integer key refuses `1.5`, `"1"` and `true`. `devices` are `"0-7"`, `"0,2"`, `[0, 1]`,
`list(range(0, 8))` or `range(0, 8)`; the text is read, never evaluated.
"""

TITLES = {
    RunConfig: "Run",
    BatchConfig: "Batch and lengths",
    AlgorithmConfig: "Algorithm",
    ExperimentConfig: "Blocks",
    SftConfig: "Supervised fine-tuning (`pipeline: sft`, beside the keys of the run)",
}
NAMES_BELOW = {"rewards": ".DOMAIN", "parts": ".NAME"}  # blocks that the user names
READ_FROM_TEXT = {  # what a validator takes beside the type that it makes of it
    "device_mapping": "devices or null",
    **dict.fromkeys(("file_name", "tag_included", "sources"), "string or list of strings"),
}


def page() -> str:
    """The whole of docs/configuration.md."""
    parts = [
        INTRO,
        "## Keys\n\nFlat keys stand at the top level of the file; blocks have tables of their own below.\n",
    ]
    inherited = {key for model in (RunConfig, BatchConfig, AlgorithmConfig) for key in model.model_fields}
    for model, title in TITLES.items():
        own = model not in (ExperimentConfig, SftConfig)
        keys = [key for key in model.model_fields if own or key in model.__annotations__ or key not in inherited]
        parts.append(f"### {title}\n\n{_table(model, keys)}")
    for model, title in _blocks(ExperimentConfig).items():
        parts.append(f"### {title}\n\n{_summary(model)}\n\n{_table(model, list(model.model_fields))}")
    for model, title in _blocks(SftConfig).items():
        if model not in _blocks(ExperimentConfig):  # what it inherits stands in the table of the same path
            parts.append(
                f"### {title} with `pipeline: sft`\n\n{_summary(model)}\n\n{_table(model, list(model.__annotations__))}"
            )
    return "\n".join([*parts, *_legacy()])


def _blocks(root: type[BaseModel]) -> dict[type[BaseModel], str]:
    """Every block of a schema, in its order, with the key paths at which it may stand."""
    paths: dict[type[BaseModel], list[str]] = {}
    engines: dict[type[BaseModel], list[str]] = {}

    def visit(model: type[BaseModel], prefix: str) -> None:
        for key, info in model.model_fields.items():
            for block in models_in(info.annotation):
                if engine := _engine(block):
                    (config,) = models_in(block.model_fields["strategy_config"].annotation)
                    names = engines.setdefault(config, [])
                    names += [f"`{engine}`"] if f"`{engine}`" not in names else []
                else:
                    path = f"{prefix}{key}{NAMES_BELOW.get(key, '')}"
                    paths.setdefault(block, []).append(f"`{path}`")
                    visit(block, f"{path}.")

    visit(root, "")
    titles = {block: ", ".join(found) for block, found in paths.items()}
    return titles | {block: f"`strategy_config` of {', '.join(found)}" for block, found in engines.items()}


def _engine(block: type[BaseModel]) -> str | None:
    """The `strategy_name` that chooses this `strategy_args` block; None for other blocks."""
    name = block.model_fields.get("strategy_name")
    return get_args(name.annotation)[0] if name else None


def _table(model: type[BaseModel], keys: list[str]) -> str:
    properties = model.model_json_schema()["properties"]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        info = model.model_fields[key]
        meaning = " ".join((info.description or "").split())
        kind = _type(key, model, properties[key])
        rows.append(_row(f"`{key}`", kind, _default(model, key), meaning))
    return "\n".join(rows) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(model: type[BaseModel], key: str) -> str:
    info = model.model_fields[key]
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    return "that of its keys" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(list(value) if isinstance(value, tuple) else value)


def _type(key: str, model: type[BaseModel], schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    options = schema.get("anyOf", [schema])
    if key in READ_FROM_TEXT:
        return READ_FROM_TEXT[key]
    if blocks := models_in(model.model_fields[key].annotation):
        engines = ", ".join(f"`{engine}`" for block in blocks if (engine := _engine(block)))
        kind = f"block; `strategy_name` {engines}" if engines else "block"
        kind = "blocks by name" if schema.get("type") == "object" else kind
        return kind + (" or null" if {"type": "null"} in options else "")
    return " or ".join(_alternative(option) for option in options)


def _alternative(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    name = "map" if schema["type"] == "object" else schema["type"]
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return " ".join([name, ", ".join(limits)]).strip()


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _legacy() -> Iterator[str]:
    roles = ", ".join(f"`{role}`" for role in ROLES)
    yield f"""\
## Keys of ROLL that are ignored

They may stand in a file: they give a warning, and nothing else. `*` is any of {roles}.

| key | why |
|---|---|"""
    without = {key: f"{reader_text(*reader)}; read there" for key, reader in IGNORED_WITHOUT.items()}
    yield from (_row(f"`{key}`", reason) for key, reason in sorted((IGNORED | without).items()))
    yield """
## Keys and values of ROLL that are not supported yet

A value in the last column says that the feature is off, so the key may stand; any other value is refused.

| key | feature | may stand with |
|---|---|---|"""
    for key, later in sorted(NOT_SUPPORTED_YET.items()):
        yield _row(f"`{key}`", later.feature, ", ".join(f"`{_yaml(value)}`" for value in later.off))
    for key, values in sorted(LATER_VALUES.items()):
        for value, feature in values.items():
            yield _row(f"`{key}: {value}`", feature, "")
    yield ""


if __name__ == "__main__":
    print(page(), end="")
