"""Trackers by name, and how the configuration names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from roll_gspo.config.base import Problem, parse_names
from roll_gspo.registry import Registry, did_you_mean

TRACKERS = Registry(
    "track_with",
    {
        "mlflow": "roll_gspo.tracking.mlflow:MlflowTracker",
        "stdout": "roll_gspo.tracking.stdout:StdoutTracker",
        "swanlab": "roll_gspo.tracking.swanlab:SwanlabTracker",
        "tensorboard": "roll_gspo.tracking.tensorboard:TensorBoardTracker",
        "trackio": "roll_gspo.tracking.trackio:TrackioTracker",
        "wandb": "roll_gspo.tracking.wandb:WandbTracker",
    },
)


def is_tracker(name: str) -> bool:
    """Return whether `name` is a shipped tracker or the dotted path of a user's."""
    return name in TRACKERS or bool({".", ":"} & set(name))


def parse_trackers(value: Any) -> tuple[str, ...]:
    """Read one name or a list of names. `none`, null and an empty list mean no tracker."""
    return () if value in (None, "none", ["none"]) else parse_names(value)


TrackerNames = Annotated[tuple[str, ...], BeforeValidator(parse_trackers)]


def tracker_options(names: tuple[str, ...], kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each tracker of `names`, without those that are null.

    Args:
        names: values of `track_with`.
        kwargs: `tracker_kwargs`: options by tracker, or those of the only tracker.
    """
    blocks = kwargs if all(map(is_tracker, kwargs)) else dict.fromkeys(names, kwargs)
    return {name: {k: v for k, v in (blocks.get(name) or {}).items() if v is not None} for name in names}


def broken_tracker_rules(names: tuple[str, ...], kwargs: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with `track_with` and `tracker_kwargs`."""
    for name in dict.fromkeys(names):
        if not is_tracker(name):
            hint = did_you_mean(name, list(TRACKERS))
            yield Problem("track_with", f"unknown tracker '{name}'{hint} (known: {', '.join(sorted(TRACKERS))}, none)")
        if names.count(name) > 1:
            yield Problem("track_with", f"names '{name}' {names.count(name)} times; name it once")
    options = [key for key in kwargs if not is_tracker(key)]
    if options and len(names) > 1:
        message = f"with several trackers, write their options below their names: {names[0]}: {{{options[0]}: ...}}"
        yield Problem(f"tracker_kwargs.{options[0]}", message, ("track_with",))
    if not options:
        for name, block in kwargs.items():
            if not isinstance(block, dict | None):
                yield Problem(f"tracker_kwargs.{name}", f"expected a block of options, got {block!r}")
