"""Keeps classes of transformers usable for trainers after vLLM has changed them.

vLLM computes some architectures with transformers' own classes, e.g. OLMo 2, OLMo 3 and SmolLM3. It adds the support of
`torch.compile` to these classes in place (vLLM 0.32, `models/transformers/base.py`), so that models of a trainer in the
same process would compute with it, too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import MODEL_MAPPING, PretrainedConfig
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import get_current_vllm_config_or_none

_OF_VLLM = "do_not_compile"  # every instance that vLLM builds has this attribute


def separate_from_trainers(config: PretrainedConfig) -> None:
    """Make the class of a decoder behave as in transformers, except for the instances that vLLM builds.

    Args:
        config: configuration of the decoder. Nothing changes if vLLM has its own class for it.
    """
    if type(config) not in MODEL_MAPPING:
        return
    found: Any = MODEL_MAPPING[type(config)]
    decoder: Any = found[0] if isinstance(found, tuple) else found
    decorated_init = decoder.__init__
    if TorchCompileWithNoGuardsWrapper not in decoder.__bases__ or decorated_init.__module__ == __name__:
        return
    own_init = inspect.getclosurevars(decorated_init).nonlocals["old_init"]
    decorated_call = decoder.__call__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init = own_init if get_current_vllm_config_or_none() is None else decorated_init
        init(self, *args, **kwargs)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = decorated_call if _OF_VLLM in vars(self) else torch.nn.Module.__call__
        return call(self, *args, **kwargs)

    decoder.__init__, decoder.__call__ = __init__, __call__
