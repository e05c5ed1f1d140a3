"""Four domains with different rewards, on Megatron and vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import SIZES, metrics_of, spawn
from forked_command import train
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from roll_gspo.data.multi_domain import DOMAINS
from roll_gspo.models.tiny import TINY_MODELS, byte_tokenizer, save
from roll_gspo.sandbox import Limits, Sandbox, SandboxError

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.vllm, pytest.mark.slow]


def test_multi_domain_example_scores_and_plots_every_domain(tmp_path: Path) -> None:
    try:
        Sandbox(Limits()).close()
    except SandboxError as error:
        pytest.skip(str(error))
    small = [size for size in SIZES if not size.startswith(("prompt_length", "response_length"))]
    arguments = (*small, "max_steps=2", "warm_start.steps=60", "output_dir=out", "run_name=run")
    outcome = train("--config-name", "example_multi_domain", *arguments, folder=tmp_path)
    assert outcome.code == 0, outcome.out[-3000:] + outcome.err
    run = tmp_path / "out/example_multi_domain/run"
    rows = metrics_of(run)
    for row in rows[1:]:
        assert sum(row[f"domain/{name}/num_samples"] for name in DOMAINS) == 32
        assert all(row[f"domain/{name}/num_samples"] == 8 for name in DOMAINS), "equal shares"
        assert all(row[f"domain/{name}/failed"] == 0 for name in DOMAINS)
        assert {"reward/component/right", "reward/component/compiled", "reward/component/followed"} <= set(row)
    assert rows[-1]["validation/num_samples"] == 16
    assert all(f"validation/{name}/avg@1" in rows[-1] for name in DOMAINS)
    page = (run / "report.html").read_text()
    assert all(name in page for name in DOMAINS)


@pytest.mark.long  # the vLLM server of the judge takes a minute to start
def test_judge_and_reward_model_beside_rules(tmp_path: Path, pretrained: Path) -> None:
    """Score with an LLM judge on a local server and a classifier; the values are those of random models."""
    classifier = tmp_path / "classifier"
    config = Qwen3Config(**{**TINY_MODELS["tiny_qwen3"].hf_config, "num_labels": 1, "pad_token_id": 0})
    save(Qwen3ForSequenceClassification(config), byte_tokenizer(), classifier)
    dropped = ("prompt_length", "response_length", "validation")
    small = [size for size in SIZES if not size.startswith(dropped)]
    judge = (
        f"{{engine: {{model: {pretrained}, max_model_len: 4096}}, parser: '([0-9])', max_tokens: 1024, temperature: 1}}"
    )
    liked = f"{{model_name_or_path: {classifier}, normalize: sigmoid}}"
    outcome = spawn(
        *("--config-name", "example_multi_domain", *small, f"pretrain={pretrained}", "max_steps=1", "run_name=run"),
        *("output_dir=out", "validation=none"),
        *("rewards.multiple_choice.worker_cls=null", "+rewards.multiple_choice.combine=weighted_sum"),
        "+rewards.multiple_choice.parts.right={worker_cls: multiple_choice_boxed}",
        f"+rewards.multiple_choice.parts.judge={{worker_cls: llm_judge, weight: 0.1, worker_args: {judge}}}",
        f"+rewards.instructions.parts.liked={{worker_cls: reward_model, weight: 0.1, worker_args: {liked}}}",
        folder=tmp_path,
    )
    assert outcome.code == 0, outcome.out[-3000:] + outcome.err
    row = metrics_of(tmp_path / "out/example_multi_domain/run")[-1]
    assert row["domain/instructions/failed"] == 0 and 0 < row["reward/component/liked"] < 1
    assert row["domain/multiple_choice/failed"] < 8 and row["reward/component/judge"] > 0
