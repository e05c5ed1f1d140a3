"""The sample browser: its HTML and the samples that its script reads."""

from __future__ import annotations

from roll_gspo.report.embedded import EmbeddedSamples
from roll_gspo.report.html_page import plural

_CONTROLS = """
<form class="filters" aria-label="Filters">
<label class="search">Search prompts and responses <input name="words" type="search" autocomplete="off"></label>
<label>Set <select name="set"><option value="">all</option><option>training</option><option>validation</option>
</select></label>
<label>Step <select name="step"><option value="">all</option></select></label>
<label>Domain <select name="domain"><option value="">all</option></select></label>
<label>Score <span class="range"><input name="low" type="number" step="any" placeholder="from" aria-label="Score from">
<input name="high" type="number" step="any" placeholder="to" aria-label="Score to"></span></label>
<label>End <select name="end"><option value="">all</option></select></label>
<label>Show <select name="kind"><option value="all">all</option><option value="failed">reward failed</option>
<option value="truncated">truncated at the length limit</option><option value="traced">with ratio</option>
</select></label>
<label>Order <select name="order"><option value="new">newest step</option><option value="old">oldest step</option>
<option value="best">highest score</option><option value="worst">lowest score</option>
<option value="long">longest</option><option value="short">shortest</option>
<option value="stale">highest staleness</option><option value="turns">most turns</option>
<option value="mismatch">largest engine − trainer difference</option></select></label>
<button type="reset">Reset</button></form>
<div class="panes"><div class="list"><p id="count" role="status"></p>
<ul id="rows" role="listbox" tabindex="0" aria-label="Samples"></ul>
<div class="pages"><button id="before" type="button">Previous</button><span id="page"></span>
<button id="after" type="button">Next</button></div></div>
<article id="sample" aria-label="Selected sample"></article></div>
"""


def browser_section(samples: EmbeddedSamples, validation: EmbeddedSamples, static: str) -> str:
    """Return the browser, which its script unhides, and `static`, which is shown without JavaScript."""
    if not samples.steps and not validation.steps:
        return static
    sets = (("training", samples), ("validation", validation))
    data = "".join(
        f'<data class="rollouts" data-set="{name}" data-step="{step}" value="{text}"></data>'
        for name, embedded in sets
        for step, text in embedded.steps
    )
    return (
        f'<p class="facts">{_description(samples, validation)}</p>'
        f'<div class="browser" id="browser" hidden>{_CONTROLS}{data}</div><div id="samples-static">{static}</div>'
    )


def _description(samples: EmbeddedSamples, validation: EmbeddedSamples) -> str:
    """Return how many samples the page holds, and where the others are."""
    has_all_read = samples.num_samples == samples.num_read
    of_read = f" of {samples.num_read:,}" if samples.read_all and not has_all_read else ""
    left_out = f"; {plural(samples.num_steps_left_out, 'step')} left out" if samples.num_steps_left_out else ""
    order = (
        ""
        if samples.read_all and has_all_read and not left_out
        else " Traced groups come first, then groups with failed rewards, then groups whose scores differ."
    )
    of_validation = (
        f" Of validation, it holds {validation.num_samples:,} samples of {plural(len(validation.steps), 'step')}."
        if validation.steps
        else ""
    )
    return (
        f"This page holds {samples.num_samples:,}{of_read} samples of {plural(len(samples.steps), 'step')}{left_out}."
        f"{order}{of_validation} All samples are in <code>rollouts/step_*.parquet</code> in the run's folder."
    )
