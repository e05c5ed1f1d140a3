"""Episodes in the sample browser, in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsed_run import episode, message, record, turn, write_step

from roll_gspo.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install roll-gspo[test])")
pytestmark = pytest.mark.e2e

EVIL = "</script><img src=x onerror=window.hurt=1>"
CALL = ['Let me add. <tool_call>\n{"name": ', '"add", "arguments": {"a": 1}}', "\n</tool_call>"]
PLAYED = episode(
    [
        turn(CALL, message("tool", f"13 {EVIL}", '{"name": "add"}'), reward=0.25, metrics={"tool_calls": 1.0}),
        turn(["<tool_call>{add}"], message("user", "no call"), given=["<tool>", "13"], invalid=True, reward=-0.5),
        turn(["The sum", " is 13."], given=["no"], reward=1.0),
    ],
    prompt="<|user|>7+6?",
    version_runs=[{"version": 3, "tokens": 6}, {"version": 4, "tokens": 3}],
    num_rewritten=1,
    num_branches=2,
)
FAILED = episode(
    [turn(["7"])], "failed", score=None, failed=True, failure=f"ValueError: {EVIL}", traceback='File "shop.py", line 7'
)
LONG = episode(
    [turn([f"try {i}"], message("user", "wrong"), given=["wrong"] if i else []) for i in range(12)], "max_turns"
)


@pytest.fixture(scope="module")
def opened(chromium: playwright.Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[playwright.Page, list[str]]:
    """Open a report of four samples, three of them episodes; collect its errors and console messages."""
    folder: Path = tmp_path_factory.mktemp("run")
    write_step(folder, 1, [one | {"group": i} for i, one in enumerate((PLAYED, FAILED, LONG, record()))])
    page = chromium.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.goto(write_report(folder).as_uri())
    page.wait_for_selector("#browser:not([hidden])")
    return page, problems


@pytest.fixture
def page(opened: tuple[playwright.Page, list[str]]) -> Iterator[playwright.Page]:
    page, problems = opened
    page.click("button[type=reset]")
    found(page, 4)
    yield page
    assert page.evaluate("window.hurt") is None and problems == []
    assert page.locator("#sample img, #sample script").count() == 0


def found(page: playwright.Page, number: int) -> None:
    """Wait until the filters leave this number of samples."""
    playwright.expect(page.locator("#count")).to_have_text(f"{number} of 4 samples")


def show(page: playwright.Page, sample: int) -> None:
    page.evaluate(f"history.replaceState(null, '', '#'); location.hash = '#step=1&sample={sample}'")
    playwright.expect(page.locator("#sample")).to_contain_text(f"sample {sample} of rollouts/step_000001")


def test_episode_is_shown_turn_by_turn(page: playwright.Page) -> None:
    show(page, 0)
    heads = page.locator(".turn > summary").all_inner_texts()
    assert [head.split("\n")[0] for head in heads] == [
        'Turn 13 tokens · reward 0.25 · advantage +0.5 · weights 3 · tool_calls 1calls add({"a":1})',
        "Turn 21 token · reward −0.5 · advantage +0.5 · weights 3invalidcalls malformed: {add}",
        "Turn 32 tokens · reward 1 · advantage +0.5 · weights 4",
    ]
    bubbles = page.locator(".bubble")
    assert [bubble.split("\n")[0] for bubble in bubbles.all_inner_texts()] == [
        *("assistant, sampled", "tool result, given"),
        *("assistant, sampled", "user, given"),
        "assistant, sampled",
    ]
    assert bubbles.nth(1).locator("pre").text_content() == f"13 {EVIL}"
    assert bubbles.nth(4).locator("pre").text_content() == "The sum is 13."
    facts = page.inner_text("#sample")
    for text in (
        "3 turns",
        "ended by the environment",
        "9 tokens, 3 of them given",
        "one of 2 conversations",
        "history before 1 of the turns",
    ):
        assert text in facts


def test_calls_are_marked_within_the_answer(page: playwright.Page) -> None:
    show(page, 0)
    marked = page.locator(".bubble.sampled [data-i].call")
    assert [int(i or -1) for i in marked.evaluate_all("all => all.map(s => s.dataset.i)")] == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"name": "a", "arguments": {}}</tool_call> <tool_call>{"name": "b"}', ["a({})", "b({})"]),
        ('[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}, {"name": "b"}]</s>', ['a({"x":1}), b({})']),
        ('[TOOL_CALLS]a[ARGS]{"q": "x"}[TOOL_CALLS]b[CALL_ID]7[ARGS]{}</s>', ['a({"q":"x"})', "b({})"]),
        ('{"name": "a", "parameters": {"x": 1}}<|eot_id|>', ['a({"x":1})']),
        ('<|python_tag|>{"name": "a", "parameters": {}}<|eom_id|>', ["a({})"]),
        ("<tool_call>[1]</tool_call>", ["malformed: [1]"]),
        ('The name is {"name": 1}', []),
    ],
)
def test_calls_of_every_format_are_found(page: playwright.Page, text: str, calls: list[str]) -> None:
    assert page.evaluate("text => callsIn(text).map(call => call.text)", text) == calls


def test_given_tokens_are_apart_and_uncolored(page: playwright.Page) -> None:
    show(page, 0)
    given = page.locator(".turn > details.raw")
    assert given.locator("summary").all_inner_texts() == [
        "2 given tokens, outside the loss",
        "1 given token, outside the loss",
    ]
    assert given.first.locator("pre").text_content() == "<tool>13"
    colors = page.locator("#tokens [data-i]").evaluate_all("all => all.map(s => s.style.backgroundColor !== '')")
    assert colors == [True, True, True, False, False, True, False, True, True]
    sampled, masked = (
        page.locator(selector).first.evaluate("e => getComputedStyle(e).borderTopStyle")
        for selector in (".bubble.sampled", ".bubble.given")
    )
    assert (sampled, masked) == ("solid", "dashed")


def test_tokens_are_selected_by_keyboard_across_turns(page: playwright.Page) -> None:
    show(page, 0)
    page.focus("#tokens")
    page.keyboard.press("End")
    assert page.inner_text("#token").startswith('token 9 " is 13." · log-prob, trainer −1.5')
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#token").startswith('token 6 "<tool_call>{add}"'), "given tokens are folded"
    page.locator("#tokens .raw > summary").nth(1).click()
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#token") == 'token 7 "no" · given by the environment outside the loss'


def test_failed_episode_shows_its_cause_and_traceback(page: playwright.Page) -> None:
    page.select_option("[name=end]", "failed")
    found(page, 1)
    assert page.inner_text("#sample .failure") == f"Environment failed: ValueError: {EVIL}"
    page.click("#sample .raw > summary")
    assert 'File "shop.py", line 7' in page.inner_text("#sample .raw pre")


def test_episodes_are_filtered_by_their_end_and_ordered_by_turns(page: playwright.Page) -> None:
    assert page.locator("[name=end] option").all_inner_texts() == ["all", "done", "failed", "max_turns"]
    page.select_option("[name=order]", "turns")
    playwright.expect(page.locator("#rows li").first).to_contain_text("12 turns")
    page.select_option("[name=end]", "max_turns")
    found(page, 1)
    assert "ended by max_turns" in page.inner_text("#sample")
    assert "try 0 → try 1" in page.inner_text("#rows .excerpt")


def test_middle_of_a_long_conversation_is_folded(page: playwright.Page) -> None:
    show(page, 2)
    turns = page.locator(".turn")
    is_open = "all => all.map(turn => turn.open)"
    assert turns.evaluate_all(is_open) == [True] * 3 + [False] * 6 + [True] * 3
    heads = page.locator(".turn > summary")
    assert "try 5" in heads.nth(5).inner_text(), "a folded turn shows its answer"
    page.click("text=Open all turns")
    assert all(turns.evaluate_all(is_open))
    page.click("text=Fold all turns")
    assert not any(turns.evaluate_all(is_open))
    heads.nth(4).press("Enter")
    assert turns.nth(4).locator(".bubble.sampled").is_visible()


def test_response_of_one_turn_is_shown_as_before(page: playwright.Page) -> None:
    show(page, 3)
    assert page.locator("pre#tokens > span").all_inner_texts() == ["4", "2", "<|end|>"]
    assert page.locator(".turn").count() == 0


@pytest.mark.parametrize("width", [1300, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_conversation_fits_the_page(page: playwright.Page, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    show(page, 0)
    fits = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1300, "height": 900})
    assert fits
