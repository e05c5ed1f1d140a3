"""Side effects of an in-process vLLM engine on the process that it shares with a trainer, and their reversal.

Side effects of vLLM 0.32: `LLM()` seeds every global generator and `generate` draws from torch's. The CPU worker
replaces `torch.set_num_threads` by a no-op and passes LD_PRELOAD and LOCAL_WORLD_SIZE to child processes. Closing an
engine destroys the default process group, even one that it did not create, and the groups of all other engines.
Two effects remain: `gc.freeze()` of live objects at engine start (until `close_engine`), and a default gloo group if
none existed. A trainer that needs torch.distributed must initialise it before the engine is built.
"""

from __future__ import annotations

import gc
import os
import random
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore  # not exported by torch.distributed
from vllm import LLM
from vllm.distributed import parallel_state
from vllm.platforms import current_platform
from vllm.v1.engine import core as engine_core

from roll_gspo.rendezvous import group_backend
from roll_gspo.strategies.vllm.engine.shared_classes import separate_from_trainers

_open_engines: weakref.WeakSet[LLM] = weakref.WeakSet()
_vllm_created_group = False


@contextmanager
def global_rng_kept() -> Iterator[None]:
    """Restore the random state of python, numpy and torch (CPU and current CUDA device) on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def open_engine(worker_environment: Mapping[str, str], **engine_args: object) -> LLM:
    """Build an `LLM` and reverse its side effects on this process.

    Args:
        worker_environment: environment variables for the engine's processes only.
        engine_args: arguments of `LLM`.
    """
    global _vllm_created_group
    if current_platform.is_cpu():
        # Avoids about 20 s of g++ before the first log-probabilities. Unlike TORCH_COMPILE_DISABLE=1 it does not
        # affect the trainer. vLLM reads it when LLM() imports the sampler.
        type(current_platform).simple_compile_backend = "eager"
    had_group = dist.is_initialized()
    if not had_group and engine_args.get("tensor_parallel_size", 1) == 1:
        # A store in memory: vLLM would open one that listens on all interfaces.
        dist.init_process_group(group_backend(), store=HashStore(), rank=0, world_size=1)
    set_num_threads = torch.set_num_threads
    inherited = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE", *worker_environment)}
    if _open_engines:
        # vLLM's groups are global and were created for the first engine; a second one may need different groups
        # (those of a MoE model). All have a single rank, so open engines can use the new ones.
        parallel_state.destroy_model_parallel()
    gc.collect()  # garbage that exists when vLLM freezes the heap is never freed
    try:
        os.environ.update(worker_environment)
        with global_rng_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised by vLLM's use of torch; users cannot act on it
            llm = LLM(**engine_args)  # pyright: ignore[reportArgumentType]
        separate_from_trainers(llm.model_config.hf_text_config)
    finally:
        torch.set_num_threads = set_num_threads
        for name, value in inherited.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    _vllm_created_group = _vllm_created_group or (not had_group and dist.is_initialized())
    _open_engines.add(llm)
    return llm


def close_engine(llm: LLM) -> None:
    """Free an engine but keep the process groups of the trainer and other engines."""
    global _vllm_created_group
    _open_engines.discard(llm)
    module: Any = engine_core
    original = module.cleanup_dist_env_and_memory
    if _open_engines:
        module.cleanup_dist_env_and_memory = gc.unfreeze
    elif not _vllm_created_group:
        module.cleanup_dist_env_and_memory = _release_foreign_group
    else:
        _vllm_created_group = False
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        module.cleanup_dist_env_and_memory = original


def _release_foreign_group() -> None:
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    world = parallel_state._WORLD
    if world is not None:
        world.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None
    gc.collect()
