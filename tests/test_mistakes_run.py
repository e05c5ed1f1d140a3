"""Mistakes on the command line, in values, layouts, devices and folders: one line names each, and no traceback.

tests/test_mistakes_data.py has those in models and data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome

Command = Callable[..., Outcome]
GSPO, SFT = ("--config-name", "example_gspo"), ("--config-name", "example_sft")
HF = (*GSPO, "strategy=hf")
DRY = "--dry-run"

# Files of the working directory.
FILES = {
    "tabs.yaml": "defaults: [example_gspo, _self_]\nexp_name: a\n\tmax_steps: 3\n",
    "indent.yaml": "defaults: [example_gspo, _self_]\nexp_name: a\n  max_steps: 3\n",
    "twice.yaml": "defaults: [example_gspo, _self_]\nseed: 1\nseed: 2\n",
    "list.yaml": "- a\n- b\n",
    "empty_defaults.yaml": "defaults: [nothing_like_this]\n",
    "group.yaml": "defaults: [example_gspo, override policy_los: clip, _self_]\n",
    "typo.yaml": "defaults: [example_gspo, _self_]\nmax_stps: 3\n",
    "interpolation.yaml": "defaults: [example_gspo, _self_]\nrun_name: ${no.such.key}\n",
    "resolver.yaml": "defaults: [example_gspo, _self_]\nrun_name: ${nothing:1}\n",
    "callbacks.yaml": "defaults: [example_gspo, _self_]\nhydra: {callbacks: {x: {_target_: os.mkdir, path: touched}}}",
    "logging.yaml": "defaults: [example_gspo, _self_]\nhydra: {job_logging: {root: {handlers: [x]}, handlers: {x: {(): "
    "os.mkdir, path: touched}}}}\n",
    "binary.yaml": "\x00\x01",
    "no_function.py": "value = 3\n",
    "broken_syntax.py": "def f(:\n",
    "raises.py": "raise RuntimeError('no luck')\n",
    "needs.py": "import package_that_nobody_has\ndef f(prompt, response, ground_truth): return 0.0\n",
    "rewards.py": "def f(prompt, response, ground_truth, *, scale): return 0.0\n",
    "a_file": "",
}
REWARD = "rewards.column_addition"
TRAIN = "actor_train.training_args"
LAYOUT = "actor_train.strategy_args.strategy_config"

MISTAKES: list[tuple[tuple[str, ...], str]] = [
    # the command line
    ((*GSPO, "--dryrun"), "--dryrun: unknown option; did you mean '--dry-run'?"),
    ((*GSPO, "--multi-run", "seed=1,2"), "--multi-run: unknown option; did you mean '--multirun'?"),
    ((*GSPO, "-x"), "-x: unknown option"),
    (("--config-name",), "--config-name: its value is missing"),
    (("--config-name", "--dry-run"), "--config-name: its value is missing"),
    (("--config_name", "example_gspo"), "--config_name: unknown option; did you mean '--config-name'?"),
    (("example_gspo",), "'example_gspo': expected key=value"),
    ((*GSPO, "max_steps"), "'max_steps': expected key=value"),
    ((*GSPO, "max_steps", "3"), "'max_steps': expected key=value"),
    ((*GSPO, "max_steps=[1"), "command line (++max_steps=[1): cannot be parsed"),
    ((*GSPO, "max_steps:3"), "'max_steps:3': expected key=value"),
    (("max_steps=3",), "--config-name: missing"),
    ((*GSPO, "--jobs", "none", "-m"), "--jobs: expected the number of runs"),
    ((*GSPO, "--config-dir", "nowhere"), "--config-dir: no folder 'nowhere'"),
    ((*GSPO, "--resolve"), "--resolve"),
    ((*GSPO, "--run", "--cfg", "job"), "--cfg"),
    ((*GSPO, "--experimental-rerun", "a_file"), "--experimental-rerun: it would run code"),
    ((*GSPO, "+hydra.callbacks.x._target_=os.mkdir"), "hydra.callbacks.x._target_: is refused"),
    ((*GSPO, "hydra/launcher=joblib", "-m", "seed=1,2"), "hydra/launcher: is refused"),
    # names of configurations and options
    (("--config-name", "example_gsp"), "no configuration 'example_gsp'; did you mean 'example_gspo'?"),
    (("--config-name", "conf/example_gspo"), "--config-name: 'conf/example_gspo' is a path; write --config-dir conf"),
    ((*GSPO, "adv_estimator=grp"), "adv_estimator: no option 'grp'; did you mean 'grpo'?"),
    ((*GSPO, "modle=tiny_qwen3"), "modle: unknown key"),
    ((*GSPO, "data/x=3"), "data/x: there is no such config group"),
    ((*GSPO, "policy_loss=my_losses.gated"), "policy_loss: "),
    # YAML files
    *(
        (("--config-dir", ".", "--config-name", name), f"{name}.yaml:3: not valid YAML")
        for name in ("tabs", "indent", "twice")
    ),
    (("--config-dir", ".", "--config-name", "list"), "list"),
    (("--config-dir", ".", "--config-name", "binary"), "binary"),
    (("--config-dir", ".", "--config-name", "empty_defaults"), "no configuration 'nothing_like_this'"),
    (("--config-dir", ".", "--config-name", "group"), "policy_los"),
    (("--config-dir", ".", "--config-name", "typo"), "typo.yaml:2: max_stps: unknown key; did you mean 'max_steps'?"),
    (("--config-dir", ".", "--config-name", "interpolation"), "interpolation.yaml:2: run_name: "),
    (("--config-dir", ".", "--config-name", "resolver"), "resolver.yaml:2: run_name: "),
    (("--config-dir", ".", "--config-name", "callbacks"), "hydra.callbacks: x would run code"),
    (("--config-dir", ".", "--config-name", "logging"), "hydra.job_logging: it would run code"),
    # values
    ((*HF, "max_steps=ten", "seed=-1", "exp_name=2024", "gamma=2"), "max_steps: should be a valid integer, got 'ten'"),
    ((*HF, "actor_train=3"), "actor_train: expected a block of keys, got 3"),
    ((*HF, "rewards=null"), "rewards: expected a block of keys, got None"),
    ((*HF, "exp_name=../../x"), "exp_name: expected the name of one folder"),
    ((*HF, "run_name=a/b"), "run_name: expected the name of one folder"),
    ((*HF, f"{TRAIN}.learning_rate=1e-4x"), f"{TRAIN}.learning_rate: should be a valid number"),
    ((*HF, "actor_infer.generating_args.temperature=-1"), "actor_infer.generating_args.temperature: "),
    ((*HF, "kl_loss_coef=0.1", "use_kl_loss=false"), "kl_loss_coef: is used only with use_kl_loss"),
    ((*HF, "response_length=0"), "response_length: should be greater than 0"),
    ((*HF, "system_envs={A: 1}"), "system_envs.A: should be a valid string"),
    ((*HF, "pipeline=rl"), "pipeline: unknown name 'rl'; did you mean 'rlvr'?"),
    ((*SFT, "rollout_batch_size=8"), "rollout_batch_size: "),
    # batches, layouts and devices
    ((*HF, "rollout_batch_size=7"), "rollout_batch_size: 7 "),
    ((*HF, f"{TRAIN}.per_device_train_batch_size=0"), f"{TRAIN}.per_device_train_batch_size: "),
    ((*GSPO, f"{LAYOUT}.tensor_model_parallel_size=3"), "actor_train.device_mapping: 1 "),
    ((*GSPO, "actor_train.device_mapping='0-'"), "actor_train.device_mapping: expected device numbers"),
    (
        (*GSPO, "actor_train.device_mapping=[0,1]", "rollout_batch_size=64", DRY),
        "actor_train.device_mapping: 2 devices",
    ),
    ((*GSPO, "actor_train.device_mapping=[3]"), "actor_train.device_mapping: device 3 "),
    # rewards, trackers
    (
        (*HF, f"{REWARD}.worker_cls=math_rul"),
        f"{REWARD}.worker_cls: unknown reward 'math_rul'; did you mean 'math_rule'?",
    ),
    ((*HF, f"{REWARD}.worker_cls=no_such_module.f"), "no module 'no_such_module'"),
    ((*HF, f"{REWARD}.worker_cls=no_function.f"), "module 'no_function' has no 'f'"),
    ((*HF, f"{REWARD}.worker_cls=no_function.value"), "is of type int; name a function or a class"),
    ((*HF, f"{REWARD}.worker_cls=broken_syntax.f"), f"{REWARD}: "),
    ((*HF, f"{REWARD}.worker_cls=raises.f"), f"{REWARD}: "),
    ((*HF, f"{REWARD}.worker_cls=needs.f"), "needs the package 'package_that_nobody_has'"),
    ((*HF, f"{REWARD}.worker_cls=rewards.f", f"{REWARD}.worker_args={{scal: 1}}"), "unknown argument scal"),
    ((*HF, f"{REWARD}.worker_args=null"), f"{REWARD}.worker_args: "),
    ((*HF, "track_with=wandbb"), "track_with: unknown tracker 'wandbb'; did you mean 'wandb'?"),
    ((*HF, "track_with=[stdout,none]"), "track_with"),
    # folders and data
    ((*HF, "output_dir=a_file"), "output_dir: a_file/example_gspo/"),
    ((*HF, "logging_dir=a_file/x"), "logging_dir: a_file/x/example_gspo/"),
    ((*HF, "actor_train.data_args.file_name=gone.jsonl"), "actor_train.data_args.file_name: gone.jsonl cannot be"),
    ((*HF, "pretrain=./gone", "warm_start=null"), "pretrain: no folder './gone'"),
    ((*HF, "resume_from_checkpoint=gone"), "resume_from_checkpoint: gone does not exist"),
    (
        (*HF, "resume_from_checkpoint=torn/step_000002", DRY),
        "torn/step_000002 is incomplete (step_000002: state.json is",
    ),
    ((*HF, "output_dir=torn_run", "resume_from_checkpoint=true"), "is damaged (state.json is missing)"),
    ((*HF, "resume_with_changes=true"), "resume_with_changes: is used only with resume_from_checkpoint"),
    (
        (*HF, "output_dir=used", "run_name=run", DRY),
        "run_name: used/example_gspo/run holds the results of a run already",
    ),
    ((*HF, "output_dir=locked", "run_name=run"), "run_name: process 1 on elsewhere has been writing into"),
]


@pytest.fixture
def mistaken(command: Command, workplace: Path) -> Command:
    """The command in a folder with the files of mistakes."""
    for name, text in FILES.items():
        (workplace / name).write_text(text)
    marker = json.dumps({"step": 2, "parts": {"state.json": 10}})
    for folder in ("torn/step_000002", "torn_run/example_gspo/a/checkpoints/step_000002"):
        (workplace / folder).mkdir(parents=True)
        (workplace / folder / "COMPLETE.json").write_text(marker)
    for folder, file, text in (
        ("used", "metrics.jsonl", "{}\n"),
        ("locked", ".lock", json.dumps({"host": "elsewhere", "pid": 1, "started": 1, "since": "noon"})),
    ):
        (workplace / folder / "example_gspo/run").mkdir(parents=True)
        (workplace / folder / "example_gspo/run" / file).write_text(text)
    return command


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(a[-2:])[:60] for a, _ in MISTAKES])
def test_mistake_is_named_in_one_line(mistaken: Command, arguments: tuple[str, ...], expected: str) -> None:
    outcome = mistaken(*arguments, *([] if arguments[-1] in ("--config-name", DRY) else [DRY]))
    assert outcome.code == 2, outcome.out + outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    first, *problems = outcome.err.splitlines()
    assert first.startswith("roll_gspo: ") and " problem" in first
    assert any(expected in problem for problem in problems)
    assert len(problems) == int(first.split()[1]) == len(set(problems)), "each problem is one line and is told once"
    assert not Path("touched").exists() and not Path("output").exists()
