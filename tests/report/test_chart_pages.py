"""Interactive charts of report and comparison in headless Chromium."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from roll_gspo.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install roll-gspo[test])")
pytestmark = pytest.mark.e2e

EVIL = "<img src=x onerror=window.hurt=1> \x1b\u202e\ud800"
SHOWN = "<img src=x onerror=window.hurt=1> ␛⟨U+202E⟩⟨U+D800⟩"
NUM_STEPS = 100


def row(step: int) -> dict[str, float]:
    return {
        "rollout/score_mean": step / 100,
        "actor/clip_fraction": 0.1 if step % 2 else 0.0,
        "actor/clip_fraction_sequence": 0.2,
        "actor/grad_norm": 1234567.0 + step,
        "actor/lr": 1e-7 * step,
        "time/generate": 2.0,
        "time/update": 1.0 + step / 100,
        "time/step": 3.0 + step / 100,
        "custom/large": -123456.789 * step,
        "custom/close": 0.99995 + 1e-6 * step,
        f"custom/{EVIL}": 1.0,
    } | ({"validation/score_mean": 0.3} if step % 50 == 0 else {})


@pytest.fixture(scope="module")
def opened(chromium: playwright.Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[playwright.Page, list[str]]:
    """Open the report of a run; collect errors, console messages and requests."""
    folder = tmp_path_factory.mktemp("run")
    lines = (json.dumps({"step": step, **row(step)}) + "\n" for step in range(1, NUM_STEPS + 1))
    (folder / "metrics.jsonl").write_text("".join(lines))
    page = chromium.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(write_report(folder).as_uri())
    page.wait_for_selector("#controls:not([hidden])")
    page.wait_for_selector("figure .plot svg")
    return page, problems


@pytest.fixture
def page(opened: tuple[playwright.Page, list[str]]) -> Iterator[playwright.Page]:
    page, problems = opened
    yield page
    page.evaluate(
        "charts.forEach(c => Object.assign(c, {hidden: new Set(), log: c.data.log})); view.zoom = {}; leave();"
        "document.querySelector('[name=filter]').value = ''; filterCharts(byId('controls'));"
    )
    smooth(page, 0)
    assert page.evaluate("window.hurt") is None and problems == []


def smooth(page: playwright.Page, weight: float) -> None:
    page.locator("[name=smoothing]").evaluate(
        f"slider => {{ slider.value = {weight}; slider.dispatchEvent(new Event('input')); }}"
    )
    page.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")


def chart(page: playwright.Page, title: str) -> playwright.Locator:
    return page.locator(f"figure[aria-label={json.dumps(title)}]")


def hover(figure: playwright.Locator, share: float) -> None:
    """Move the pointer over a chart to this share of its width."""
    figure.locator(".plot > svg").scroll_into_view_if_needed()
    box = figure.locator(".plot > svg > svg").bounding_box() or {}
    figure.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)


def y_labels(figure: playwright.Locator) -> list[str]:
    return figure.locator("text.y").all_text_contents()


@pytest.mark.parametrize("width", [1300, 420])
def test_no_text_of_a_chart_is_cut_and_axes_have_titles(page: playwright.Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))")
    page.wait_for_timeout(100)
    cut = page.evaluate(
        """charts.map(c => c.svg).flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
             const box = text.getBBox(), plot = svg.querySelector('svg');
             const right = text.classList.contains('y') ? plot.x.baseVal.value : svg.viewBox.baseVal.width;
             return box.x < 0 || box.x + box.width > right || box.y < 0 || box.y + box.height > 211;
           }).map(text => text.textContent))"""
    )
    titles = page.evaluate("charts.map(c => c.svg.querySelectorAll('.title').length)")
    page.set_viewport_size({"width": 1300, "height": 900})
    assert cut == [] and set(titles) == {2} and len(titles) == 8
    assert y_labels(chart(page, "custom/large"))[:2] == ["−10M", "−5M"]
    assert "0.99995" in y_labels(chart(page, "custom/close")) or "1" in y_labels(chart(page, "custom/close"))


def test_pointer_shows_name_value_and_step_in_the_color_of_the_series(page: playwright.Page) -> None:
    figure = chart(page, "Clip fraction")
    hover(figure, 0.3)
    assert page.inner_text("#tip > b").startswith("step 2") or page.inner_text("#tip > b").startswith("step 3")
    rows = page.locator("#tip > div")
    assert rows.locator("span:first-child").all_inner_texts()[1] == "●sequences"
    assert rows.locator(".value").all_inner_texts() == ["0.1", "0.2"]
    colors = rows.evaluate_all("rows => rows.map(row => getComputedStyle(row.querySelector('.value')).color)")
    keys = figure.locator(".key i").evaluate_all("keys => keys.map(key => getComputedStyle(key).color)")
    assert colors == keys and len(set(colors)) == 2
    marks = page.evaluate("charts.filter(c => c.width).map(c => c.mark.getAttribute('visibility'))")
    assert set(marks) == {"visible"}, "every chart marks the same step"
    page.mouse.move(0, 0)
    assert page.is_hidden("#tip") and figure.locator(".mark").get_attribute("visibility") == "hidden"


def test_values_can_be_read_by_keyboard(page: playwright.Page) -> None:
    chart(page, "Reward").locator(".plot > svg").focus()
    page.keyboard.press("End")
    assert page.inner_text("#tip").split("\n")[0] == "step 100"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#tip").split("\n")[0] == "step 99" and "0.99" in page.inner_text("#tip")


def test_slider_smooths_lines_and_keeps_the_values(page: playwright.Page) -> None:
    assert page.evaluate("smoothed([1, 2, 3], 0.5)") == pytest.approx([1, 5 / 3, 17 / 7])
    figure = chart(page, "Clip fraction")
    smooth(page, 0)
    assert figure.locator("path.faint").count() == 0
    smooth(page, 0.9)
    assert figure.locator("path.faint.c0").count() == figure.locator("path.line.c0").count() == 1
    assert page.inner_text("#controls output") == "0.9"
    hover(figure, 0.5)
    assert page.locator("#tip .value").all_inner_texts() == ["0.1", "0.2"], "the tooltip has the value of the step"


def test_button_switches_between_linear_and_logarithmic(page: playwright.Page) -> None:
    figure = chart(page, "Clip fraction")
    button = figure.locator(".tools button", has_text="log")
    assert button.get_attribute("aria-pressed") == "true"
    assert figure.locator(".count").inner_text() == "50 values of 0 or below not drawn."
    button.click()
    assert button.get_attribute("aria-pressed") == "false" and figure.locator(".count").inner_text() == ""
    assert y_labels(figure)[0] == "0"


def test_name_in_the_legend_hides_its_line(page: playwright.Page) -> None:
    figure = chart(page, "Clip fraction")
    figure.locator(".key", has_text="sequences").click()
    assert figure.locator("path.c1").count() == 0 and figure.locator("path.c0").count() > 0
    assert figure.locator(".key").evaluate_all("keys => keys.map(k => k.ariaPressed)") == ["true", "false"]
    figure.locator(".key", has_text="sequences").click()
    assert figure.locator("path.c1").count() > 0


def test_drag_zooms_all_charts_until_reset(page: playwright.Page) -> None:
    figure = chart(page, "Reward")
    hover(figure, 0.5)
    page.mouse.down()
    hover(figure, 0.6)
    hover(figure, 0.75)
    page.mouse.up()
    for title in ("Reward", "Gradient norm", "Stages of a step"):
        playwright.expect(chart(page, title).locator("text.x").first).to_have_text(re.compile("50|55|60"))
        assert chart(page, title).locator("text.x").last.text_content() in ("70", "75")
    assert float(y_labels(figure)[0]) >= 0.5
    page.click("[name=reset]")
    playwright.expect(figure.locator("text.x").first).to_have_text("0")
    assert page.is_disabled("[name=reset]")


def test_downloads_are_the_values_and_a_picture(page: playwright.Page) -> None:
    figure = chart(page, "Reward")
    with page.expect_download() as download:
        figure.locator(".tools button", has_text="CSV").click()
    with Path(download.value.path()).open() as file:
        rows = list(csv.reader(file))
    assert download.value.suggested_filename == "Reward.csv"
    assert rows[0] == ["step", "training", "validation"] and rows[50] == ["50", "0.5", "0.3"] and rows[99][2] == ""
    with page.expect_download() as download:
        figure.locator(".tools button", has_text="PNG").click()
    data = Path(download.value.path()).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    assert int.from_bytes(data[16:20]) > 1000 and int.from_bytes(data[20:24]) == 2 * (210 + 58)


def test_stage_times_are_stacked(page: playwright.Page) -> None:
    hover(chart(page, "Stages of a step"), 0.5)
    total, update, generate = map(float, page.locator("#tip .value").all_inner_texts())
    assert total == pytest.approx(update + generate) and generate == 2.0 and 1.45 < update < 1.55
    assert page.locator("#tip > div").first.inner_text().startswith("●sum")


def test_filter_finds_charts_of_any_section(page: playwright.Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = false; })")
    page.fill("[name=filter]", "CUSTOM/")
    assert page.locator("figure[data-chart]:visible").count() == 3
    assert chart(page, "custom/large").is_visible()


def test_names_of_metrics_are_text(page: playwright.Page) -> None:
    page.fill("[name=filter]", "onerror")
    figure = page.locator("figure[data-chart]:visible")
    assert figure.locator("text.title").first.text_content() == SHOWN
    assert page.locator("img").count() == 0


def test_comparison_shows_bands_seeds_and_every_metric(chromium: playwright.Browser, tmp_path: Path) -> None:
    from compared_runs import two_metrics, write_run

    from roll_gspo.compare.page import write_comparison

    for seed, change in ((0, 1), (1, 1), (2, 2)):
        path = tmp_path / f"{seed}"
        write_run(path, f"pg_clip_low=0.0{change}", seed=seed, row=lambda s, c=seed: two_metrics(s) | {"own/x": c + s})
    page = chromium.new_page(viewport={"width": 1300, "height": 900})
    page.goto(write_comparison([tmp_path]).page.as_uri())
    page.wait_for_selector("figure .plot svg")
    clipped = page.locator("figure", has_text="Clipped tokens")
    assert clipped.locator("path.band").count() == 1 and clipped.locator("path.line").count() == 2
    page.fill("[name=filter]", "own/x")
    figure = page.locator("figure[data-chart]:visible")
    assert figure.count() == 1
    hover(figure, 0.98)
    assert page.locator("#tip .value").all_inner_texts() == ["20.5 (20 to 21)", "22"]
    page.close()
