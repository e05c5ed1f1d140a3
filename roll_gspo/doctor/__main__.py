"""Check whether this machine can run a configuration.

python -m roll_gspo.doctor --config-name example_gspo [key=value ...] [--offline]
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

import roll_gspo
from roll_gspo.command_line import check_arguments
from roll_gspo.config.load import Loaded
from roll_gspo.config.sft import AnyConfig
from roll_gspo.doctor.communication import TIMEOUT_S, communication_findings
from roll_gspo.doctor.findings import (
    Check,
    Finding,
    Findings,
    Status,
    error,
    not_checked,
    ok,
    run_checks,
    summary,
    text_of,
    warning,
)
from roll_gspo.doctor.gpus import gpu_findings, read_inventory, used_devices
from roll_gspo.doctor.machine import (
    IMPORT_TIMEOUT_S,
    cluster_findings,
    disk_findings,
    hub_findings,
    import_findings,
    limit_findings,
    main_memory_findings,
    network_findings,
    sandbox_findings,
    shared_memory_findings,
)
from roll_gspo.doctor.versions import version_findings
from roll_gspo.errors import ConfigError, RollGspoError
from roll_gspo.pipelines.devices import finds_cuda, has_gpus
from roll_gspo.pipelines.plan import Plan, make_plan
from roll_gspo.pipelines.preflight import CHECKS, check_folders
from roll_gspo.printable import printable
from roll_gspo.run import exit_status, load_composed, report_problems, set_environment, with_composed

USAGE = """usage: python -m roll_gspo.doctor --config-name NAME [key=value ...] [--offline]

  --config-name NAME   as of roll-gspo
  key=value            override any key
  --offline            check only what needs neither the devices of the run nor a network

The exit status is 1 if a check found an error, 2 if the configuration is not valid.
"""
_DEVICE, _NETWORK = "the machine of the run", "the network"
_FILES = ("models", "data", "disk", "folders")


def main() -> None:
    """Console entry point; exit status 0 without errors, 1 with errors, 2 if the configuration is not valid."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--offline"]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    try:
        check_arguments(arguments)
        if refused := {"-m", "--multirun", "--dry-run", "--jobs"} & set(arguments):
            raise ConfigError(f"{min(refused)}: is an option of roll_gspo.run; remove it")
    except ConfigError as problem:
        report_problems(str(problem).splitlines(), "command line")
        raise SystemExit(2) from None
    offline = "--offline" in sys.argv[1:]

    def use(composed: DictConfig) -> None:
        if code := exit_status(lambda: examine(load_composed(composed), offline), "repeat the command"):
            raise SystemExit(code)

    with_composed(arguments, use)


def examine(loaded: Loaded, offline: bool) -> int:
    """Run every check, print a line per finding as soon as it is known, and return the exit status."""
    config = loaded.config
    set_environment(config.system_envs)
    title = f"roll_gspo {roll_gspo.__version__}: can this machine run {config.exp_name}?"
    print(printable(title + (" (--offline)" if offline else "")), flush=True)
    findings = []
    for finding in run_checks(checks_of(config, loaded.warnings, offline), offline):
        findings.append(finding)
        print(printable(text_of(finding)), flush=True)
    print(summary(findings))
    return int(any(finding.status == Status.ERROR for finding in findings))


def checks_of(config: AnyConfig, config_warnings: tuple[str, ...], offline: bool) -> list[Check]:
    """Return the checks of a configuration in the order of printing."""
    on_cuda = None if offline else finds_cuda(config)
    return [
        Check("plan", lambda: _plan_findings(make_plan(config, config_warnings, on_this_machine=not offline))),
        Check("versions", lambda: version_findings(config)),
        Check("preflight", lambda: _preflight_findings(config, offline)),
        Check("disk", lambda: disk_findings(config), needs=_DEVICE),
        Check("limits", limit_findings),
        Check("sandbox", lambda: sandbox_findings(config)),
        Check("main memory", lambda: main_memory_findings(config, on_cuda), needs=_DEVICE),
        Check("shared memory", lambda: shared_memory_findings(config), needs=_DEVICE),
        Check("GPUs", lambda: _gpu_findings(config, on_cuda), 100, needs=_DEVICE),
        Check("network", network_findings, needs=_DEVICE),
        Check("hub", lambda: hub_findings(config), needs=_NETWORK),
        Check("engines", lambda: import_findings(config), 4 * IMPORT_TIMEOUT_S, needs=_DEVICE),
        Check("cluster", lambda: cluster_findings(config), needs=_NETWORK),
        Check("communication", lambda: _communication_findings(config), TIMEOUT_S + 60, needs=_DEVICE),
    ]


def _plan_findings(plan: Plan) -> Findings:
    yield from (error(str(problem)) for problem in plan.not_runnable)
    yield from (warning(text) for text in (*map(str, plan.warnings), *plan.config_warnings))
    if not plan.not_runnable:
        yield ok("the devices, batches and options fit together")


def _preflight_findings(config: AnyConfig, offline: bool) -> Findings:
    """Run the checks that a run makes before it imports an engine. Offline, files may be on another machine."""
    complete = []
    for topic, check in {**CHECKS, "folders": check_folders}.items():
        try:
            check(config)
        except RollGspoError as problem:
            elsewhere = offline and topic in _FILES
            status = Status.NOT_CHECKED if elsewhere else Status.ERROR
            text = "on this machine: {}" if elsewhere else "{}"
            yield from (Finding(status, text.format(line), topic) for line in str(problem).splitlines())
        else:
            complete.append(topic)
    yield ok(f"{', '.join(complete)}: complete")


def _gpu_findings(config: AnyConfig, on_cuda: bool | None) -> Findings:
    if on_cuda is None and not has_gpus():
        return [not_checked("the devices of the cluster; repeat the command on its machines without RAY_ADDRESS")]
    if not on_cuda:
        return [ok("none, or hidden by CUDA_VISIBLE_DEVICES: the roles compute on the CPU")]
    return gpu_findings(config, read_inventory())


def _communication_findings(config: AnyConfig) -> Findings:
    if config.execution == "local":
        return [ok("not used: all roles are in one process (execution: local)")]
    return communication_findings(len(used_devices(config)) if has_gpus() else 0)


if __name__ == "__main__":
    main()
