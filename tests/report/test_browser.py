"""The sample browser in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsed_run import record, write_samples, write_step

from roll_gspo.report.page import write_report
from roll_gspo.rollout_files import Sample, step_path

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install roll-gspo[test])")
pytestmark = pytest.mark.e2e

EVIL = "</script><script>window.hurt=1</script><img src=x onerror=window.hurt=1>\"'&amp;"
CONTROLS = "\x00\x07\x1b[31m\r\x7f\u202eevil\u2066"
SHOWN_CONTROLS = "␀␇␛[31m␍␡⟨U+202E⟩evil⟨U+2066⟩"
SAMPLES: dict[str, tuple[str, ...]] = {
    "plain": ("4", "2", "<|end|>"),
    "evil": (EVIL, "</pre></article></body>", "<!--", "]]>"),
    "emoji": ("a", "", "", "👩‍👩‍👧", "é", "\ufffd"),
    "arabic": ("مرحبا", " ", "بالعالم", " 42"),
    "controls": (CONTROLS, "\n", "\n\n", "end"),
    "long": ("word ",) * 20_000,
    "empty": ("",),
}


def samples() -> list[Sample]:
    """Return a group of each kind, all of one step."""
    return [
        record(tokens, group=i, prompt=f"prompt {name} {EVIL}", score=i / 10, domain="code" if i % 2 else "maths")
        for i, (name, tokens) in enumerate(SAMPLES.items())
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report: step 1 has a sample of every kind, step 2 has failures, steps 3 to 14 have 16 samples each."""
    folder = tmp_path_factory.mktemp("run")
    write_step(folder, 1, samples(), traced=[0])
    why = f"took longer than 5 s {EVIL}"
    failed = [record(score=0.0, failed=i == 1, failure=why if i == 1 else None, components={}) for i in range(3)]
    write_step(folder, 2, [*failed, record(["cut"], finish_reason="length", group=1, domain=EVIL)])
    for step in range(3, 15):
        write_step(folder, step, [record(score=i / 16, group=i // 4, weights_version=step) for i in range(16)])
    for step in (7, 14):
        held_out = [
            record(score=float(i == step / 7), group=i, prompt=f"held-out {i}", id=f"row {i}") for i in range(2)
        ]
        write_samples(step_path(folder / "validation", step), held_out)
    return write_report(folder)


@pytest.fixture(scope="module")
def opened(chromium: playwright.Browser, report: Path) -> tuple[playwright.Page, list[str]]:
    """Open the report; collect its errors, console messages and requests."""
    page = chromium.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(report.as_uri())
    page.wait_for_selector("#browser:not([hidden])")
    assert page.evaluate("scrollY") == 0, "opening the browser does not move the page"
    return page, problems


@pytest.fixture
def page(opened: tuple[playwright.Page, list[str]]) -> Iterator[playwright.Page]:
    """Return the report without filters; assert afterwards that nothing went wrong in it."""
    page, problems = opened
    page.click("button[type=reset]")
    found(page, 207)
    yield page
    assert page.evaluate("window.hurt") is None and problems == []


def found(page: playwright.Page, number: int) -> None:
    """Wait until the filters leave this number of samples."""
    playwright.expect(page.locator("#count")).to_have_text(f"{number} of 207 samples")


def show(page: playwright.Page, name: str) -> None:
    """Select the sample of step 1 of this kind."""
    page.fill("[name=words]", f"prompt {name} ")
    playwright.expect(page.locator("#sample pre").first).to_contain_text(f"prompt {name} ")
    found(page, 1)


def scores(page: playwright.Page) -> list[str]:
    return page.locator("#rows .score").all_inner_texts()


def test_browser_replaces_the_static_samples(page: playwright.Page) -> None:
    assert page.is_hidden("#samples-static")
    found(page, 207)
    assert page.locator("#rows li").count() == 50 and page.inner_text("#page") == "page 1 of 5"
    page.click("#after")
    page.click("#after")
    assert page.inner_text("#page") == "page 3 of 5"
    assert "Step 14 · group 0 · maths" in page.inner_text("#sample")


def test_browser_filters_and_orders(page: playwright.Page) -> None:
    page.select_option("[name=step]", "2")
    found(page, 4)
    page.select_option("[name=kind]", "failed")
    found(page, 1)
    assert "Reward failed: took longer than 5 s </script>" in page.inner_text("#sample .failure")
    assert scores(page) == ["failed"] and "not trained on" in page.inner_text("#sample")
    page.select_option("[name=kind]", "truncated")
    found(page, 1)
    assert "truncated at the length limit" in page.inner_text("#sample")
    page.click("button[type=reset]")
    found(page, 207)
    page.select_option("[name=domain]", "code")
    found(page, 3)
    page.select_option("[name=order]", "best")
    playwright.expect(page.locator("#rows .score").first).to_have_text("0.5")
    assert scores(page) == ["0.5", "0.3", "0.1"]
    page.select_option("[name=domain]", "")
    page.fill("[name=low]", "0.5")
    page.fill("[name=high]", "0.6")
    found(page, 12 * 2 + 2)
    page.fill("[name=low]", "2")
    found(page, 0)
    assert page.inner_text("#sample") == "No sample matches."


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "long"])
def test_browser_shows_any_text_unchanged(page: playwright.Page, name: str) -> None:
    show(page, name)
    tokens = page.locator("#tokens > span")
    assert tokens.count() == len(SAMPLES[name])
    shown = [token.replace(CONTROLS, SHOWN_CONTROLS).replace("\n", "↵\n") or "·" for token in SAMPLES[name]]
    assert tokens.all_text_contents() == shown
    assert page.locator("#sample pre").first.text_content() == f"prompt {name} {EVIL}"
    assert page.locator("#sample img, #sample script").count() == 0


def test_browser_truncates_a_long_response_and_counts_the_rest(page: playwright.Page) -> None:
    show(page, "long")
    assert page.locator("#tokens > span").count() == 3000
    assert page.inner_text(".rest") == "… 17,000 more tokens in the file."
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_browser_shows_reward_components(page: playwright.Page) -> None:
    show(page, "plain")
    assert page.locator(".parts span").all_inner_texts() == ["correct", "length", "score"]
    assert page.locator(".parts b").all_inner_texts() == ["1.5", "−0.5", "0"]
    widths = [bar["width"] for bar in (b.bounding_box() or {} for b in page.locator(".parts i").all())]
    assert widths[0] == pytest.approx(3 * widths[1], abs=1)
    left, right = (page.locator(".parts i").nth(i).bounding_box() or {} for i in (1, 0))
    assert left["x"] + left["width"] == pytest.approx(right["x"], abs=1), "negative components are left of 0"


def test_browser_colors_tokens_by_each_metric(page: playwright.Page) -> None:
    show(page, "plain")

    def shades(metric: str) -> list[str]:
        page.select_option("#metric", metric)
        return page.locator("#tokens > span").evaluate_all("all => all.map(s => s.style.backgroundColor)")

    pale = [shade.removeprefix("rgb(var(--hot) / ").removesuffix(")") for shade in shades("logp")]
    assert list(map(float, pale)) == pytest.approx([0.75 * v / 5 for v in (0.25, 0.5, 0.75)], abs=1e-3)
    assert shades("diff") == shades("ratio") == shades("adv") == ["rgb(var(--cold) / 0.750)"] * 3
    assert page.locator("#tokens > span").first.evaluate("s => getComputedStyle(s).backgroundColor").startswith("rgba(")
    assert page.inner_text("#scale").split() == ["≤", "−0.5", "≥", "0.5"]
    page.select_option("#metric", "ratio")
    assert page.inner_text("#scale").split() == ["≤", "0.9048", "≥", "1.105"]
    show(page, "arabic")
    assert page.locator("#metric option").all_inner_texts() == ["log-prob (trainer)", "engine − trainer", "advantage"]


def test_browser_shows_token_values_at_the_pointer_and_by_keyboard(page: playwright.Page) -> None:
    show(page, "plain")
    page.locator("#tokens > span").nth(1).hover()
    values = page.locator("#tip").inner_text()
    for text in ('token 2 "2"', "−0.5", "60.65 %", "−0.49", "0.01", "1.105"):
        assert text in values
    page.focus("#tokens")
    page.keyboard.press("End")
    assert page.inner_text("#token").startswith('token 3 "<|end|>" · log-prob, trainer −0.75')
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#token").startswith('token 2 "2"')


def test_browser_list_can_be_used_by_keyboard(page: playwright.Page) -> None:
    page.focus("#rows")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.locator("#rows li[aria-selected=true]").get_attribute("id") == "row3"
    assert page.get_attribute("#rows", "aria-activedescendant") == "row3"
    page.keyboard.press("End")
    assert page.inner_text("#page") == "page 5 of 5" and "Step 1 · " in page.inner_text("#sample")
    page.keyboard.press("Home")
    page.locator(".members button").nth(2).click()
    assert page.locator("#rows li[aria-selected=true]").get_attribute("id") == "row2"


@pytest.mark.parametrize("width", [1300, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_fits_and_can_be_read(page: playwright.Page, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    show(page, "evil")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('#tokens')).color,"
        " getComputedStyle(document.querySelector('#tokens')).backgroundColor]"
    )
    page.set_viewport_size({"width": 1300, "height": 900})
    lights = [sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) for color in (ink, paper)]
    assert (lights[1] - lights[0] > 500) is (scheme == "light") and abs(lights[1] - lights[0]) > 500


def test_browser_shows_validation_apart_and_a_prompt_across_steps(page: playwright.Page) -> None:
    page.select_option("[name=set]", "validation")
    found(page, 4)
    page.fill("[name=words]", "held-out 1")
    found(page, 2)
    assert page.inner_text("#sample h3").startswith("Validation at step 14")
    steps = page.locator(".members.steps button")
    assert steps.all_inner_texts() == ["step 7: 1", "step 14: 0"]
    steps.first.click()
    assert page.inner_text("#sample h3").startswith("Validation at step 7")
    assert page.evaluate("location.hash") == "#step=7&sample=1&set=validation"


def test_browser_shows_a_group_side_by_side(page: playwright.Page) -> None:
    page.select_option("[name=step]", "14")
    page.select_option("[name=set]", "training")
    found(page, 16)
    page.click("button.side")
    columns = page.locator(".columns > div")
    assert columns.count() == 4 and columns.locator(".score").all_inner_texts() == ["0.1875", "0.125", "0.0625", "0"]
    assert columns.locator("pre").all_inner_texts() == ["42<|end|>"] * 4
    page.click("button.side")
    assert page.is_hidden(".columns")


def test_address_selects_a_sample_even_if_filters_hide_it(page: playwright.Page) -> None:
    page.select_option("[name=kind]", "failed")
    found(page, 1)
    page.evaluate("location.hash = '#step=9&sample=6'")
    playwright.expect(page.locator("#sample h3")).to_contain_text("Step 9 · group 1")
    found(page, 207)
    assert "sample 6 of rollouts/step_000009" in page.inner_text("#sample")
    assert page.locator("#rows li[aria-selected=true]").count() == 1
    assert page.locator("#sample .facts a").first.get_attribute("href") == "#step=9&sample=6"
    page.evaluate("location.hash = '#step=9&sample=999'")
    playwright.expect(page.locator("#sample")).to_contain_text("does not hold the training sample 999 of step 9")


def test_page_without_scripts_shows_the_static_samples(chromium: playwright.Browser, report: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.is_hidden("#browser") and page.is_visible("#samples-static")
    assert "Step 14" in page.inner_text("#samples-static")
    context.close()
