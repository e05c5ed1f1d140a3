"""The rollout browser: its frame in the page, the samples that it shows, and its look and behaviour."""

from __future__ import annotations

from pathlib import Path

from roll_gspo.report.embedded import Embedded

_HERE = Path(__file__).parent
BROWSER_STYLE = (_HERE / "browser.css").read_text(encoding="utf-8")
BROWSER_SCRIPT = (_HERE / "browser.js").read_text(encoding="utf-8")

_FRAME = """
<form class="filters" aria-label="Which samples">
<label class="search">Search prompts and responses <input name="words" type="search" autocomplete="off"></label>
<label>Step <select name="step"><option value="">all</option></select></label>
<label>Domain <select name="domain"><option value="">all</option></select></label>
<label>Score <span class="range"><input name="low" type="number" step="any" placeholder="from" aria-label="Score from">
<input name="high" type="number" step="any" placeholder="to" aria-label="Score to"></span></label>
<label>Show <select name="kind"><option value="all">all</option><option value="failed">reward failed</option>
<option value="cut">cut at the length limit</option><option value="traced">with ratio</option></select></label>
<label>Order <select name="order"><option value="new">newest step</option><option value="old">oldest step</option>
<option value="best">highest score</option><option value="worst">lowest score</option>
<option value="long">longest</option><option value="short">shortest</option>
<option value="apart">engine and trainer furthest apart</option></select></label>
<button type="reset">Reset</button></form>
<div class="panes"><div class="list"><p id="count" role="status"></p>
<ul id="rows" role="listbox" tabindex="0" aria-label="Samples"></ul>
<div class="pages"><button id="before" type="button">Previous</button><span id="page"></span>
<button id="after" type="button">Next</button></div></div>
<article id="sample" aria-label="The chosen sample"></article></div>
"""


def browser_section(samples: Embedded, plain: str) -> str:
    """The browser, which a script shows, and `plain`, which is there without one."""
    if not samples.steps:
        return plain
    data = "".join(f'<data class="rollouts" value="{text}"></data>' for _, text in samples.steps)
    return (
        f'<p class="facts">{_contents(samples)}</p><div class="browser" id="browser" hidden>{_FRAME}{data}</div>'
        f'<div id="rollouts-plain">{plain}</div>'
    )


def _contents(samples: Embedded) -> str:
    """What is here, and where the rest is."""
    of = "" if not samples.read_whole or samples.num_samples == samples.num_read else f" of {samples.num_read:,}"
    steps = f"{len(samples.steps)} step{'s' if len(samples.steps) > 1 else ''}"
    left = f"; {samples.steps_left_out} more steps are not here" if samples.steps_left_out else ""
    rest = (
        ""
        if samples.num_samples == samples.num_read and samples.read_whole and not left
        else (
            " Groups that were scored again after the update come first, then failed rewards, then groups whose scores "
            "differ."
        )
    )
    return (
        f"This page holds {samples.num_samples:,}{of} samples of {steps}{left}.{rest} "
        "Every sample is a line of <code>rollouts/step_*.jsonl</code> in the run's folder."
    )
