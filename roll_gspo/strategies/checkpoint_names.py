"""Names and layouts that the tensors of a transformers model have in checkpoints, by transformers' own tables.

transformers 5 keeps some weights in another layout than the files, e.g. the experts of a layer in one tensor. Its
tables convert whole models. Here they convert one parameter at a time, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from roll_gspo.errors import CheckpointError, ConfigError

Named = tuple[str, Tensor]


class ReadTensor(Protocol):
    """Read a stored tensor, or its slice `start:stop` along `axis`, e.g. `CheckpointReader.read`."""

    def __call__(self, name: str, axis: int = 0, start: int = 0, stop: int | None = None) -> Tensor: ...


@dataclass
class _Group:
    """Stored tensors that are loaded together, by pattern, and the converter that joins them (None: one tensor)."""

    target: str
    converter: WeightConverter | None
    stored: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.stored.values() for name in names]


class CheckpointNames:
    """Conversion between the tensors of a built model and those of checkpoints.

    Exported names are those of the published checkpoints of the architecture, whatever the names in the folder are.

    Args:
        model: the model; parameters may be on the meta device. Its parameters have their original names, so build this
            object before adapters are injected.
        stored: names and shapes of the tensors in the folder that is loaded; empty if nothing is loaded.

    Raises:
        CheckpointError: a stored tensor has another shape than the model needs.
        ConfigError: the tables cannot restore stored tensors.
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._model = model
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._groups: dict[str, _Group] = {}
        transforms = get_model_conversion_mapping(model)
        groups = self._find_groups(stored or {}, transforms)
        published = transforms[: len(get_model_conversion_mapping(model, add_legacy=False))]
        self._set_reverse([one for one in published if not isinstance(one, PrefixChange) or self._was_used(one)])
        for group in groups:
            self._add_group(group, stored or {})

    def _was_used(self, prefix: PrefixChange) -> bool:
        """Return whether a prefix was found in the files; otherwise none is added to exported names."""
        loaded = vars(self._model).get("_weight_conversions") or ()  # set by `from_pretrained`
        return prefix.was_used() or any(prefix.source_patterns == one.source_patterns for one in loaded)

    def _set_reverse(self, transforms: list[WeightTransform]) -> None:
        reverse = [transform.reverse_transform() for transform in reversed(transforms)]
        self._renamings = [one for one in reverse if isinstance(one, WeightRenaming)]
        self._converters = [one for one in reverse if isinstance(one, WeightConverter)]
        for converter in self._converters:
            converter.operations = [_as_view(operation) for operation in converter.operations]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}

    def split(self, name: str, tensor: Tensor) -> list[Named]:
        """Return the checkpoint tensors of a parameter or buffer, in the order of their names.

        They are views if the layout allows it.

        Raises:
            ConfigError: the checkpoint joins the parameter with others; use `stream`.
        """
        renamed, converter, pattern = self._reverse(name)
        if converter is None:
            return [(renamed, tensor)]
        if len(converter.source_patterns) > 1:
            raise ConfigError(
                f"model_type '{self._model.config.model_type}': the checkpoint joins '{name}' with other parameters, "
                "so that single weights cannot be exported; use another model"
            )
        converter.add_tensor(renamed, name, pattern, tensor)  # type: ignore[arg-type]
        return self._converted(converter, renamed)

    def stream(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Yield the checkpoint tensors of a model's parameters and buffers, as soon as all their parts are known.

        Args:
            tensors: names and tensors of the model. Parameters that a checkpoint joins should be neighbours, because
                they are kept until the last one arrives.
        """
        waiting: dict[str, WeightConverter] = {}
        for name, tensor in tensors:
            renamed, converter, pattern = self._reverse(name)
            if converter is None or len(converter.source_patterns) == 1:
                yield from self.split(name, tensor)
                continue
            converter = waiting.setdefault(renamed, converter)
            converter.add_tensor(renamed, name, pattern, tensor)  # type: ignore[arg-type]
            if len(converter.collected_tensors) == len(converter.source_patterns):
                yield from self._converted(waiting.pop(renamed), renamed)
        if waiting:
            raise ConfigError(f"weights of '{min(waiting)}' are incomplete; export all parameters of the model")

    def is_copied(self, name: str) -> bool:
        """Return whether checkpoint tensors of a parameter are copies, so that writing into them does not change it."""
        converter = self._reverse(name)[1]
        operations = () if converter is None else converter.operations
        return not all(isinstance(operation, _ViewChunk | _Unstack) for operation in operations)

    def _reverse(self, name: str) -> tuple[str, WeightConverter | None, str]:
        """Return the checkpoint name of a parameter (of its first tensor), and a fresh converter with its pattern."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, reverse=True)
        if pattern is None:
            return renamed, None, ""
        return renamed, deepcopy(self._by_pattern[pattern]), pattern

    def _converted(self, converter: WeightConverter, name: str) -> list[Named]:
        found: dict[str, Any] = converter.convert(name, model=self._model, config=self._model.config)
        parts = ((key, value[0] if isinstance(value, list) else value) for key, value in found.items())
        return sorted(parts, key=lambda part: dot_natural_key(part[0]))

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that make a parameter or buffer.

        Raises:
            CheckpointError: the folder has none.
        """
        return tuple(self._group(name).names)

    def join(self, name: str, read: ReadTensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a parameter or buffer, or its rows `start:stop` of dimension 0, in the stored dtype.

        Only the requested rows are read of a tensor that is stored whole and of experts that are stored one by one.

        Args:
            name: name in the model.
            read: reads stored tensors.
            start: first row.
            stop: row after the last one; None reads to the end.

        Raises:
            CheckpointError: the folder has no such tensor.
        """
        group = self._group(name)
        if group.converter is None:
            return read(group.names[0], 0, start, stop)
        length = self._shapes[name][0] if self._shapes[name] else 1
        first, last, _ = slice(start, stop).indices(length)
        if (first, last) == (0, length):
            return self._load(group, read)[name]
        if last <= first or not _stacks_rows(group.converter):
            return self._load(group, read)[name][first:last].clone()
        rows = {pattern: names[first:last] for pattern, names in group.stored.items()}
        return self._load(_Group(group.target, group.converter, rows), read)[name]

    def _group(self, name: str) -> _Group:
        tied: Mapping[str, str] = self._model.all_tied_weights_keys
        aliases = [name, *(one for pair in tied.items() if name in pair for one in pair)]
        found = next((self._groups[alias] for alias in aliases if alias in self._groups), None)
        if found is None:
            raise CheckpointError(f"no stored tensor makes the parameter '{name}' of the model; use matching files")
        return found

    def _find_groups(
        self, stored: Mapping[str, tuple[int, ...]], transforms: list[WeightTransform]
    ) -> Iterable[_Group]:
        """Assign the stored tensors to parameters, as transformers does when it loads them."""
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix: Any = self._model.base_model_prefix
        known: Any = self._shapes
        groups: dict[str, _Group] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], prefix, known)
            if target in known:
                converter = None if pattern is None else by_pattern[pattern]
                group = groups.setdefault(target, _Group(target, converter))
                group.stored.setdefault(pattern or name, []).append(name)
        return groups.values()

    def _add_group(self, group: _Group, stored: Mapping[str, tuple[int, ...]]) -> None:
        made = self._load(group, lambda name, *_: torch.empty(stored[name], device="meta"))
        for name, tensor in made.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise CheckpointError(
                    f"'{name}' has the shape {tuple(tensor.shape)} in the weights ({', '.join(group.names[:2])}), but "
                    f"config.json needs {self._shapes[name]}; use matching files"
                )
            self._groups[name] = group
        if group.converter is not None:
            found = [tuple(tensor.shape) for _, tensor in self.stream(made.items())]
            if found != [stored[name] for name in sorted(group.names, key=dot_natural_key)]:
                raise ConfigError(
                    f"model_type '{self._model.config.model_type}': transformers {transformers.__version__} joins "
                    f"{', '.join(group.names[:3])} and cannot split them again, so that the model cannot be exported; "
                    "use another model"
                )

    def _load(self, group: _Group, read: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Return the parameters that a group makes."""
        if group.converter is None:
            return {group.target: read(group.names[0])}
        converter: Any = deepcopy(group.converter)
        for pattern, names in group.stored.items():
            for name in names:
                converter.add_tensor(group.target, name, pattern, read(name))
        return dict(self._converted(converter, group.target))


class _ViewChunk(Chunk):
    """Split a tensor into views; transformers copies them."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> dict[str, Tensor]:
        (tensor,) = _single(input_dict)
        targets = self.get_target_patterns(target_patterns, **kwargs)
        return dict(zip(targets, tensor.chunk(len(targets), self.dim), strict=True))


class _Unstack(SplitModulelist):
    """Split a stack into its members; transformers also removes their own dimensions of size 1."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> dict[str, Tensor]:
        members: dict[str, Tensor] = {}
        for pattern, tensor in zip(input_dict, _single(input_dict), strict=True):
            targets = self.get_target_patterns(input_dict, pattern, target_patterns, tensor.shape[self.dim])
            members |= zip(targets, tensor.unbind(self.dim), strict=True)
        return members


def _single(tensors: Mapping[str, Any]) -> list[Tensor]:
    return [value[0] if isinstance(value, list) else value for value in tensors.values()]


def _as_view(operation: ConversionOps) -> ConversionOps:
    if type(operation) is Chunk:
        return _ViewChunk(operation.dim, operation.num_shards_attribute)
    return _Unstack(operation.dim) if type(operation) is SplitModulelist else operation


def _stacks_rows(converter: WeightConverter) -> bool:
    """Return whether each row of the result is one member of a list of stored tensors."""
    first, *others = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(other, Concatenate) and other.dim > 0 for other in others)
