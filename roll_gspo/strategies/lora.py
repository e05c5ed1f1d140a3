"""Low-rank adapters (LoRA) of a transformers model, with the layers of `peft`.

The class of the model stays. A linear layer `q_proj` becomes `q_proj.base_layer`, `q_proj.lora_A.default` and
`q_proj.lora_B.default`; only the latter two are trained. Parameters may be on the meta device when the adapter is
added, and become DTensors later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.strategies.checkpoint_names import CheckpointNames
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.weight_update import ADAPTER

if TYPE_CHECKING:  # an optional package
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
ADAPTER_FOLDER = "adapter"
_KEY = "actor_train.model_args.lora"
_NAME = "default"
_BASE = ".base_layer"
_PEFT_PREFIX = "base_model.model."

Gather = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    """Return a tensor that is whole on this rank."""
    return tensor


class Adapter:
    """The adapter of a model. Its parameters are float32, and all others are frozen.

    Attributes:
        setup: size and place of the adapter.
        names: names of the model's weights in checkpoints.

    Args:
        model: the model, which gets the adapter's layers.
        lora: size and place of the adapter.
        seed: seed of initial values and dropout; the same on all ranks.
        names: names of the model's weights in checkpoints; read from the model if None.

    Raises:
        ConfigError: the model has no linear layer of a name.
    """

    def __init__(
        self, model: PreTrainedModel, lora: LoraSetup, seed: int, names: CheckpointNames | None = None
    ) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.setup = lora
        self.names = CheckpointNames(model) if names is None else names
        self._model = model
        self._seed = seed
        targets = _targets(model, lora)
        self._leaves = sorted({name.rpartition(".")[2] for name in targets})
        inject_adapter_in_model(self._config(targets), model)
        modules = model.named_modules()
        self._layers = {name: module for name, module in modules if isinstance(module, LoraLayer)}
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()  # peft gives them the dtype of the base
        if lora.dropout:
            self._dropouts = [cast(nn.Dropout, layer.lora_dropout[_NAME]).eval() for layer in self._layers.values()]
        else:
            self._dropouts = []

    def _config(self, target_modules: list[str]) -> LoraConfig:
        from peft import LoraConfig

        lora = self.setup
        alpha: Any = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            target_modules=target_modules,
            init_lora_weights=False,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the names that `peft` writes into files."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            for kind, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                matrix = cast(nn.Linear, matrices[_NAME])
                found[f"{_PEFT_PREFIX}{name}.{kind}.weight"] = cast(nn.Parameter, matrix.weight)
        return found

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's name and the whole initial value of every trained parameter, float32 on the CPU.

        `B` is 0. `A` is uniform as in `peft`: the default of a linear layer.
        """
        generator = torch.Generator().manual_seed(self._seed)
        for name, layer in self._layers.items():
            first, second = cast(nn.Linear, layer.lora_A[_NAME]), cast(nn.Linear, layer.lora_B[_NAME])
            values = torch.empty(first.out_features, first.in_features)
            bound = 1 / math.sqrt(first.in_features)
            yield f"{name}.lora_A.{_NAME}.weight", values.uniform_(-bound, bound, generator=generator)
            yield f"{name}.lora_B.{_NAME}.weight", torch.zeros(second.out_features, second.in_features)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set the initial values of parameters that are whole on this rank."""
        for name, value in self.initial_values():
            self._model.get_parameter(name).copy_(value)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the frozen model alone. Use it without gradient only."""
        for layer in self._layers.values():
            # `enable_adapters` would switch `requires_grad` too, which FSDP2 reads when it first gathers a parameter.
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer._disable_adapters = False

    @contextmanager
    def dropout(self, step: int, rank: int = 0) -> Iterator[None]:
        """Drop inputs of the adapter. Random numbers depend on seed, optimizer step and rank alone."""
        if not self._dropouts:
            yield
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            seed = np.random.SeedSequence([self._seed, step, rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(seed[0]))
            for module in self._dropouts:
                module.train()
            try:
                yield
            finally:
                for module in self._dropouts:
                    module.eval()

    @torch.no_grad()
    def merged_parameters(self, gather: Gather = as_it_is) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of the model as if it had no adapter, with the adapter merged into it.

        Args:
            gather: makes a parameter whole. Every rank calls it for the same parameters in the same order.
        """
        for name, parameter in self._model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            layer = self._layers.get(owner.removesuffix(_BASE)) if owner.endswith(_BASE) else None
            if layer is None and _is_adapter(name):
                continue
            value = gather(parameter.detach())
            if layer is not None and leaf == "weight":
                first, second = (cast(nn.Linear, m[_NAME]).weight.detach() for m in (layer.lora_A, layer.lora_B))
                product = gather(second) @ gather(first)
                value = torch.add(value.float(), product, alpha=self.setup.scale).to(value.dtype)
            yield without_base_layer(name), value

    def save(self, folder: Path, base: Path, dtype: torch.dtype, gather: Gather = as_it_is, write: bool = True) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, which `peft` loads.

        Args:
            folder: existing folder.
            base: checkpoint of the frozen model.
            dtype: dtype of the file.
            gather: makes a parameter whole; every rank takes part.
            write: write the files; False on all ranks but one.

        Raises:
            CheckpointError: the files cannot be written.
        """
        tensors = dict(AdapterWeights(self, dtype, gather))
        if not write:
            return
        config = self._config(self._leaves)
        config.base_model_name_or_path, config.inference_mode, config.init_lora_weights = str(base), True, True
        whole = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        try:
            config.save_pretrained(str(folder))
            save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: the adapter cannot be written ({error}); free space or choose another folder"
            ) from error


class AdapterWeights:
    """A `WeightSource` of the adapter alone, under the names of `peft`.

    Args:
        adapter: the adapter.
        dtype: dtype of the yielded tensors.
        gather: makes a parameter whole.
    """

    kind = ADAPTER

    def __init__(self, adapter: Adapter, dtype: torch.dtype, gather: Gather = as_it_is) -> None:
        self._adapter = adapter
        self._dtype = dtype
        self._gather = gather

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._adapter.parameters().items():
            yield name, self._gather(parameter.detach()).to(self._dtype)


def without_base_layer(name: str) -> str:
    """Return the name that a parameter has in the model without an adapter."""
    return name.replace(f"{_BASE}.", ".")


def identity_of(lora: LoraSetup | None) -> dict[str, Any] | None:
    """Return what a training state must agree on to be loaded; None for all weights."""
    if lora is None:
        return None
    return {"rank": lora.rank, "alpha": float(lora.alpha), "use_rslora": lora.use_rslora}


def check_same_adapter(path: Path, saved: Any, lora: LoraSetup | None) -> None:
    """Check that a training state has the adapter of the configuration.

    Args:
        path: file of the state, for the error.
        saved: `identity_of` the state.
        lora: the adapter of the configuration.

    Raises:
        CheckpointError: it has another one, or one of them trains all weights.
    """
    own = identity_of(lora)
    if saved == own:
        return
    if saved is None:
        raise CheckpointError(
            f"{path}: holds all weights, but {_KEY} asks for an adapter of rank {own and own['rank']}; remove it, or "
            "start a new run with the exported model as pretrain"
        )
    if own is None:
        values = " ".join(f"{_KEY}.{key}={_text(value)}" for key, value in saved.items())
        raise CheckpointError(f"{path}: holds an adapter, but {_KEY} is not set; set {values}")
    for key, value in saved.items():
        if own[key] != value:
            raise CheckpointError(
                f"{path}: the adapter has {key} {_text(value)}, but {_KEY}.{key} is {_text(own[key])}; set it to "
                f"{_text(value)}"
            )


def other_layers(path: Path) -> CheckpointError:
    """Return the error of a training state whose adapter is attached to other layers."""
    return CheckpointError(
        f"{path}: the adapter is attached to other layers than those of {_KEY}.target_modules; set the value that "
        "wrote it"
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _targets(model: PreTrainedModel, lora: LoraSetup) -> list[str]:
    """Return the names of the linear layers with an adapter."""
    head: Any = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    wanted = lora.target_modules
    if wanted == (ALL_LINEAR,):
        return linear
    for target in wanted:
        if not any(_matches(name, target) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"{_KEY}.target_modules: no linear layer of model_type '{model.config.model_type}' is named "
                f"'{target}'; choose among {known}, or {ALL_LINEAR}"
            )
    return [name for name in linear if any(_matches(name, target) for target in wanted)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
