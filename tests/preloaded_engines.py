"""Modules that the fork server of the tests imports once, for all processes forked from it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import hydra  # noqa: F401
import parallel_cases  # noqa: F401
import torch.distributed  # noqa: F401
import transformers  # noqa: F401

import roll_gspo.pipelines.rlvr
import roll_gspo.strategies.megatron.engine
import roll_gspo.strategies.vllm.engine.generate  # noqa: F401
