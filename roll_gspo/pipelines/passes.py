"""Size and layout of the passes of a role, for the plan and the log (no torch)."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.roles import ReferenceConfig, TrainedRoleConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.pipelines.devices import model_of


def passes_text(role: TrainedRoleConfig | ReferenceConfig) -> str:
    """Return layout and size of the passes of a block that `on_device` completed."""
    texts = ["samples packed" if role.strategy_args.packs_samples else "samples padded"]
    if isinstance(role, TrainedRoleConfig):
        budget, size = role.max_tokens_per_microbatch_in_train, role.training_args.per_device_train_batch_size
        texts.append(f"up to {budget} tokens per training pass" if budget else f"{size} sample(s) per training pass")
    budget = role.max_tokens_per_microbatch_in_infer
    texts.append(f"{budget} tokens per scoring pass" if budget else f"{role.infer_batch_size} samples per scoring pass")
    return ", ".join(texts)


def pass_rows(config: AnyConfig, on_cuda: bool | None) -> Iterator[tuple[str, str]]:
    """Yield a plan row for each role whose passes differ on GPUs.

    Args:
        config: the whole configuration.
        on_cuda: whether the roles compute on GPUs; None if not known yet.
    """
    for name, role in config.roles().items():
        if not isinstance(role, TrainedRoleConfig | ReferenceConfig):
            continue
        model = model_of(config, role)
        on_gpus = role.on_device(True, model)
        if on_cuda is not False and on_gpus != role.on_device(False, model):
            condition = "" if on_cuda else "on GPUs: "
            yield "passes", f"{name:<12} {condition}{passes_text(on_gpus)}"
