"""Engines by `strategy_name`; none is imported before it is named."""

from roll_gspo.registry import Registry

STRATEGIES = Registry(
    "strategy_name",
    {
        "megatron_train": "roll_gspo.strategies.megatron.train:MegatronTrain",
        "megatron_infer": "roll_gspo.strategies.megatron.infer:MegatronInfer",
        "hf_train": "roll_gspo.strategies.hf.train:HfTrain",
        "hf_infer": "roll_gspo.strategies.hf.infer:HfInfer",
        "vllm": "roll_gspo.strategies.vllm.engine:VllmGenerate",
    },
)
