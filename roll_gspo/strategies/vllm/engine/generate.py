"""vLLM as generation engine: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil
from vllm import LLM
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from roll_gspo.batch import Completion
from roll_gspo.errors import ConfigError, WeightTransferError
from roll_gspo.strategies.base import (
    FinishedRequest,
    GenerationRequest,
    ModelSetup,
    SampleFinished,
    Sampling,
    WeightSource,
)
from roll_gspo.strategies.head_products import uses_float32
from roll_gspo.strategies.known_models import unknown_to_vllm
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.streaming import OutstandingRequests, PromptLimits
from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.vllm.engine.adapter_transfer import BroadcastAdapters, InProcessAdapters
from roll_gspo.strategies.vllm.engine.adapters import AdapterSlots, adapter_args, check_targets
from roll_gspo.strategies.vllm.engine.broadcast_transfer import BROADCAST_ARGS, BroadcastTransfer
from roll_gspo.strategies.vllm.engine.host_process import close_engine, global_rng_kept, open_engine
from roll_gspo.strategies.vllm.engine.requests import VllmDecoder
from roll_gspo.strategies.vllm.engine.routed_experts import expert_source, recording_args
from roll_gspo.strategies.vllm.engine.sleep import SleepMode, sleep_args
from roll_gspo.strategies.vllm.engine.weight_transfer import IN_PROCESS, InProcessTransfer
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress

logger = logging.getLogger(__name__)
_CPU_BLOCK_TOKENS = 128
_CPU_MAX_NUM_SEQS = 256
_CPU_BATCHED_TOKENS = 8192
_CPU_KV_CACHE_LIMIT = 4 << 30  # bytes; clearing the cache at engine start takes about two seconds per GiB


_Transfer = InProcessTransfer | InProcessAdapters | BroadcastTransfer | BroadcastAdapters


class _Engine(NamedTuple):
    llm: LLM
    transfer: _Transfer
    decoder: VllmDecoder
    requests: OutstandingRequests
    memory: SleepMode


class VllmGenerate:
    """A vLLM engine as `StreamingStrategy`, and as `WeightReceiver` if the trainer is in another process.

    Without `receives_broadcast`, engine and trainer share this process and one device, and `update_weights` sets the
    weights. A trainer that needs `torch.distributed` must initialise it first. With `receives_broadcast`, `connect`
    (once) and `receive` set the weights. The engine's scheduler runs in this process. If `tensor_parallel_size` is
    above 1, each worker runs in a separate process: worker r is rank `first_rank + r` of the broadcast. Every method
    restores the global random state of python, numpy and torch.

    With `lora`, the weights are those of the checkpoint, and updates are adapters. Requests keep the adapter with which
    they began to sample.

    Args:
        model: the model; `temperature` and `micro_batch_size` are ignored.
        strategy_config: size and behaviour of the engine.
        max_model_len: longest prompt plus response, in tokens.
        record_routed_experts: return the experts of every token; on a CPU this disables prefix caching.
        receives_broadcast: the trainer is in another process.
        shares_devices: the engine leaves its devices while others use them (`reside`).
        lora, adapter_versions: as in `GenerationSetup`.

    Raises:
        ConfigError: vLLM rejects the settings, the experts of a dense model or of a model in several processes are to
            be recorded, or the engine is on a GPU that it does not share with its trainer.
    """

    def __init__(
        self,
        model: ModelSetup,
        strategy_config: VllmConfig,
        max_model_len: int,
        *,
        record_routed_experts: bool = False,
        receives_broadcast: bool = False,
        shares_devices: bool = False,
        lora: LoraSetup | None = None,
        adapter_versions: int = 1,
    ) -> None:
        config = strategy_config
        _check_layout(config.tensor_parallel_size, record_routed_experts, receives_broadcast)
        self._records_experts = record_routed_experts
        if lora is not None:
            config = config.model_copy(update={"load_format": "auto"})
            self._unusable = "no adapter was transferred yet"
        else:
            # Dummy weights must not generate. Those of the checkpoint are the initial policy.
            self._unusable = "no weights were transferred yet" if config.load_format == "dummy" else ""
        extra = recording_args(model.checkpoint) if record_routed_experts else {}
        extra |= BROADCAST_ARGS if receives_broadcast else {"weight_transfer_config": {"backend": IN_PROCESS}}
        extra |= sleep_args(shares_devices)
        extra |= {} if lora is None else adapter_args(model.checkpoint, lora, adapter_versions)
        try:
            llm = open_engine(_worker_environment(config), **_engine_args(model, config, max_model_len) | extra)
        except ConfigError:
            raise
        except ValueError as error:
            name = unknown_to_vllm(str(model.checkpoint))
            hint = f"; vLLM has no class for {name}: generate with strategy_name hf_infer" if name else ""
            raise ConfigError(f"vllm: the engine does not accept the settings: {error}{hint}") from error
        self._capacity = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        slots = None if lora is None else AdapterSlots(llm, adapter_versions)
        decoder = VllmDecoder(llm, expert_source(llm) if record_routed_experts else None, slots)
        requests = OutstandingRequests(decoder, PromptLimits(llm.model_config.get_vocab_size(), max_model_len))
        memory = SleepMode(llm, shares_devices, keeps_weights=lora is not None)
        try:
            transfer = _transfer(llm, lora, slots, receives_broadcast)
        except BaseException:
            close_engine(llm)
            raise
        self._engine: _Engine | None = _Engine(llm, transfer, decoder, requests, memory)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
        finished: SampleFinished | None = None,
    ) -> list[list[Completion]]:
        """Generate responses; results are in the order of `prompts`.

        In float32 a sample depends only on its prompt, its seed and the weights, not on the rest of the batch. A
        response also ends at `max_model_len` (`finish_reason` is `length`). With temperature 0 the log-probs are those
        of temperature 1.

        Raises:
            DataError: there are no prompts, or one is empty, too long, or contains an id outside the vocabulary.
            WeightTransferError: the engine has no complete weights.
        """
        engine = self._usable_engine("generate")
        with global_rng_kept():
            return engine.requests.generate(prompts, sampling, seeds, progress, finished)

    @property
    def capacity(self) -> int:
        """`max_num_seqs` of the engine, which may be vLLM's default."""
        return self._capacity

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests.

        Raises:
            ConfigError: a partial response is to be continued, but its experts were not recorded.
        """
        engine = self._usable_engine("submit")
        if self._records_experts and any(r.partial is not None and r.partial.token_ids for r in requests):
            raise ConfigError(
                "actor_train.router_replay: experts are not recorded for the tokens of a partial response; set mode: "
                "disable and record: false, or partial_rollouts: restart"
            )
        with global_rng_kept():
            engine.requests.submit(requests)

    def advance(self, seconds: float) -> list[FinishedRequest]:
        """Decode for about `seconds`. If a step fails or is interrupted, no request remains.

        Raises:
            WeightTransferError: the engine has no complete weights; the requests remain.
        """
        engine = self._usable_engine("advance")
        with global_rng_kept():
            return engine.requests.advance(seconds)

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests and return what they have sampled."""
        return self._open_engine().requests.abort(keys)

    def partials(self) -> list[FinishedRequest]:
        """Return what every outstanding request has sampled."""
        return self._open_engine().requests.partials()

    @property
    def residency(self) -> Residency:
        """Part of the engine that is in device memory."""
        return self._open_engine().memory.residency

    def reside(self, residency: Residency) -> None:
        """Sleep or wake. After a sleep the engine has no weights until the next transfer, which needs `WEIGHTS`.

        An engine with `lora` keeps its weights and its adapters.
        """
        engine = self._open_engine()
        engine.requests.read()
        if residency < engine.memory.residency and not engine.memory.keeps_weights:
            self._unusable = "the weights were freed when the engine left its device"
        with global_rng_kept():
            engine.memory.reside(residency)

    def _usable_engine(self, method: str) -> _Engine:
        engine = self._open_engine()
        engine.memory.require(Residency.FULL, method)
        if self._unusable:
            missing = (
                "receive" if isinstance(engine.transfer, BroadcastTransfer | BroadcastAdapters) else "update_weights"
            )
            raise WeightTransferError(f"{method}: {self._unusable}; call {missing} first")
        return engine

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Replace the weights in process. After an error the engine refuses to generate until an update succeeds."""
        transfer = self._open_engine().transfer
        if isinstance(transfer, BroadcastTransfer | BroadcastAdapters):
            raise WeightTransferError("update_weights: the engine receives its weights by broadcast; call receive")
        with self._replacing_weights(version):
            transfer.send(source, version)

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Join a weight broadcast; `address.first_rank` is the rank of the engine's first worker."""
        self._broadcast_transfer().connect(address)

    def receive(self, version: int) -> None:
        """Receive weights. After an error the engine refuses to generate until a transfer succeeds."""
        transfer = self._broadcast_transfer()
        with self._replacing_weights(version):
            transfer.receive(version)

    def _broadcast_transfer(self) -> BroadcastTransfer | BroadcastAdapters:
        transfer = self._open_engine().transfer
        if not isinstance(transfer, BroadcastTransfer | BroadcastAdapters):
            raise WeightTransferError(
                "the engine shares its trainer's process; build it with receives_broadcast to connect it"
            )
        return transfer

    @contextmanager
    def _replacing_weights(self, version: int) -> Iterator[None]:
        engine = self._open_engine()
        engine.memory.require(Residency.WEIGHTS, "receive weights")
        if self._records_experts and engine.requests.num_running:
            raise ConfigError(
                "actor_train.router_replay: experts are not recorded if the weights change while responses are "
                "sampled; set mode: disable and record: false, or async_mode: one_step_off"
            )
        self._unusable = f"the transfer of version {version} failed"
        engine.requests.read()
        with global_rng_kept():
            yield
        engine.decoder.version = version
        engine.decoder.use_newest_adapter()
        self._unusable = ""

    def shutdown(self) -> None:
        """Free the engine. Further calls do nothing."""
        if self._engine is not None:
            self._engine.requests.clear()
            close_engine(self._engine.llm)
            self._engine = None

    def _open_engine(self) -> _Engine:
        if self._engine is None:
            raise RuntimeError("vllm: the engine was shut down; build a new one")
        return self._engine


def _check_layout(tensor_parallel_size: int, record_routed_experts: bool, receives_broadcast: bool) -> None:
    if tensor_parallel_size == 1:
        return
    if not receives_broadcast:
        raise ConfigError(
            f"strategy_config.tensor_parallel_size: {tensor_parallel_size} does not fit an engine inside the "
            "trainer's process, which holds one device; set 1, or use separate processes (execution: ray)"
        )
    if record_routed_experts:
        raise ConfigError(
            f"strategy_config.tensor_parallel_size: {tensor_parallel_size} puts the model into processes where its "
            "experts cannot be recorded; set 1, or actor_train.router_replay.record: false"
        )


def _transfer(llm: LLM, lora: LoraSetup | None, slots: AdapterSlots | None, receives_broadcast: bool) -> _Transfer:
    if lora is None or slots is None:
        return BroadcastTransfer(llm) if receives_broadcast else InProcessTransfer(llm)
    check_targets(llm, lora)
    return (BroadcastAdapters if receives_broadcast else InProcessAdapters)(llm, lora, slots)


def _engine_args(model: ModelSetup, config: VllmConfig, max_model_len: int) -> dict[str, object]:
    on_cpu = current_platform.is_cpu()
    args: dict[str, object] = {
        "model": str(model.checkpoint),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": model.seed,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,  # None: vLLM's default for the device
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "enable_prefix_caching": config.enable_prefix_caching,
        "tensor_parallel_size": config.tensor_parallel_size,
        # Inside a Ray placement group, vLLM would choose its Ray executor, which refuses bundles of several GPUs
        # (vllm/v1/executor/ray_utils.py, vLLM 0.32).
        "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else "uni",
        "load_format": config.load_format,
        # Ignore sampling defaults of the checkpoint (top-p, end-of-sequence ids).
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "use_tqdm_on_load": False,
    }
    if uses_float32(model.dtype, config.fp32_lm_head):
        args["hf_overrides"] = {"head_dtype": "float32"}
    if config.kv_cache_memory_mb is not None:
        args["kv_cache_memory_bytes"] = config.kv_cache_memory_mb << 20
    if on_cpu:
        # If a prompt is prefilled in several chunks, vLLM rewinds the request's random generator by an offset,
        # which CPU generators do not support ("CPU Generator does not use offset").
        args["enable_chunked_prefill"] = False
        args["max_num_batched_tokens"] = max(config.max_num_batched_tokens or _CPU_BATCHED_TOKENS, max_model_len)
        args["max_num_seqs"] = max_num_seqs = config.max_num_seqs or _CPU_MAX_NUM_SEQS
        model_config = EngineArgs(**args).create_model_config()  # pyright: ignore[reportArgumentType]
        _check_cpu_head_size(model_config)
        args.setdefault("kv_cache_memory_bytes", _cpu_kv_cache_bytes(model_config, max_num_seqs, max_model_len))
    return args


def _worker_environment(config: VllmConfig) -> dict[str, str]:
    """Return the environment of worker processes, equal to the one that `open_engine` sets in this process."""
    if config.tensor_parallel_size == 1 or config.enforce_eager is False or not current_platform.is_cpu():
        return {}
    return {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}


def _check_cpu_head_size(model_config: ModelConfig) -> None:
    """Reject head sizes that vLLM cannot compute on a CPU; vLLM itself fails only in the first forward pass."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # a module for CPU builds

    size, supported = model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise ConfigError(
            f"vllm: attention heads of size {size} are not among those that vLLM computes on a CPU ({supported}); "
            "take another model, or generate with strategy_name hf_infer"
        )


def _cpu_kv_cache_bytes(model_config: ModelConfig, max_num_seqs: int, max_model_len: int) -> int:
    """Return the size of `max_num_seqs` full sequences, limited to 4 GiB and a quarter of the free memory.

    vLLM would use nearly all memory. Sequences that do not fit wait.
    """
    width = model_config.get_total_num_kv_heads() * model_config.get_head_size()
    token_bytes = 2 * model_config.get_total_num_hidden_layers() * width * model_config.dtype.itemsize
    blocks = max_num_seqs * -(-max_model_len // _CPU_BLOCK_TOKENS) + 1
    limit = min(_CPU_KV_CACHE_LIMIT, psutil.virtual_memory().available // 4)
    return min(blocks * _CPU_BLOCK_TOKENS * token_bytes, limit)
