"""The report of a run that continues, served on this machine."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browsed_run import record, write_step

from roll_gspo.errors import DataError
from roll_gspo.report.serve import ReportServer


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, ReportServer]]:
    write_step(tmp_path, 1, [record()])
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank 1#.json.gz").write_bytes(b"trace")
    server = ReportServer(tmp_path)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield tmp_path, server
    server.close()
    thread.join()


def get(server: ReportServer, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    """Request a path below the page; an absolute path is used unchanged."""
    url = urlsplit(server.url)
    connection = http.client.HTTPConnection("127.0.0.1", url.port or 0, timeout=20)
    connection.request(method, path if path.startswith("/") else url.path + path, headers={"Host": host or url.netloc})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_server_shows_the_page_and_its_traces_and_nothing_else(served: tuple[Path, ReportServer]) -> None:
    folder, server = served
    assert urlsplit(server.url).hostname == "127.0.0.1" and len(urlsplit(server.url).path) > 30
    status, page = get(server, "")
    assert status == 200 and b"connect-src 'self'" in page and b"data-version=" in page
    assert get(server, "profile/rank%201%23.json.gz") == (200, b"trace")
    for path in ("metrics.jsonl", "profile/../metrics.jsonl", "%2e%2e/x", "/", "/version", "/wrong/", "/%ff/", "x\\y"):
        assert get(server, path) == (404, b"not found"), path
    assert get(server, "", host="evil.example")[0] == 404
    assert get(server, "", host="localhost:1234")[0] == 200, "a forwarded port"
    assert get(server, "", method="POST")[0] == 501
    assert not (folder / "report.html").exists()


def test_server_renders_only_what_changed(served: tuple[Path, ReportServer]) -> None:
    folder, server = served
    assert server.page() is server.page()
    before = get(server, "version")[1]
    write_step(folder, 2, [record()])
    assert get(server, "version")[1] != before
    assert b"steps 1 to 2" in get(server, "")[1]


def test_server_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        ReportServer(tmp_path)


def test_page_refreshes_itself_and_keeps_its_state(chromium: Any, served: tuple[Path, ReportServer]) -> None:
    folder, server = served
    page = chromium.new_page()
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("figure .plot svg")
    page.wait_for_selector("#browser:not([hidden])")
    page.fill("[name=filter]", "reward")
    page.locator("figure[data-chart]:visible .tools button", has_text="log").first.click()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "actor/entropy": 0.5}) + "\n")
    write_step(folder, 3, [record(score=0.25)])
    page.evaluate("refresh()")
    page.wait_for_function("document.querySelector('header p').textContent.startsWith('steps 1 to 3')")
    page.wait_for_function("byId('count').textContent === '2 of 2 samples'")
    assert page.input_value("[name=filter]") == "reward"
    assert page.locator("figure[data-chart]:visible [aria-pressed=true]", has_text="log").count() == 1
    assert page.evaluate("charts.map(c => c.data.title)").count("Entropy") == 1
    assert page.locator("#sample h3").inner_text().startswith("Step 1 "), "the selected sample stays"
    assert page.inner_text("#live") == "live" and problems == []
    page.close()
