"""Which blocks of the schema an annotation mentions."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The blocks that an annotation mentions: those of a union, of a dict's values, or the block itself."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, dict):
        return [model for part in get_args(annotation) for model in models_in(part)]
    return []
