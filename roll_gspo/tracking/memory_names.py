"""Metrics of the memory of shared GPUs, for `tracking.names`: meaning, unit and reduction."""

MEMORY_METRICS = {
    f"memory/{phase}_{border}_gib": (
        f"Memory in use on the first shared GPU, by all processes, when roles that take turns {border} {work}.",
        "GiB",
        "max over the step",
    )
    for phase, work in (
        ("generating", "generating responses"),
        ("scoring", "scoring tokens"),
        ("training", "training"),
        ("syncing", "sending weights to the engines"),
    )
    for border in ("start", "end")
}
