from __future__ import annotations

import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from compared_runs import few_figures, write_run, write_sweep

from roll_gspo.compare.page import Comparison, common_folder, write_comparison
from roll_gspo.compare.panels import LEARNING, OTHERS, UPDATES
from roll_gspo.errors import DataError
from roll_gspo.tracking.names import METRICS

EVIL = "<script>alert('&')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags nest and ids are used once, and collects text and tags."""

    def __init__(self, written: Comparison) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = written.page.read_text()
        self.feed(self.source)
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + "\n"

    def descriptions(self) -> list[str]:
        return [str(attributes["aria-label"]) for tag, attributes in self.tags if tag == "svg"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return write_comparison([write_sweep(tmp_path_factory.mktemp("output") / "example_gspo")])


def test_page_shows_rewards_and_accuracy_against_steps_tokens_and_time(sweep: Comparison) -> None:
    descriptions = Page(sweep).descriptions()
    for title in ("Training reward", "Held-out accuracy"):
        for axis in ("training step", "generated tokens", "wall time"):
            assert sum(text.startswith(f"{title} against {axis}. ") for text in descriptions) == 1
    for title in ("Clipped tokens", "Deviation of the importance ratio", "Entropy", "Response length", "Gradient norm"):
        assert sum(text.startswith(title) for text in descriptions) == 1


def test_page_says_what_mean_and_band_are(sweep: Comparison) -> None:
    page = Page(sweep)
    (accuracy,) = [t for t in page.descriptions() if t.startswith("Held-out accuracy against training step")]
    assert "gspo: from 0.3 to 0.52 (0.5 to 0.54)" in accuracy
    assert accuracy.endswith("Mean of 3 seeds, band: lowest to highest; dots: single seeds.")
    (reward,) = [t for t in page.descriptions() if t.startswith("Training reward against training step")]
    assert "smoothed over 5 steps" in reward
    assert page.text.count("mean of 3 seeds, band: lowest to highest") == len(page.descriptions())


def test_page_has_the_table_and_the_configuration_diff(sweep: Comparison) -> None:
    text = Page(sweep).text
    for part in ("0.400 ± 0.020", "seed 2", "importance_sampling", "pg_clip_high", "seq\n", "token\n"):
        assert part in text
    assert "Attention" not in text
    assert "run_name" not in text and "output_dir" not in text


def test_page_needs_no_network(sweep: Comparison) -> None:
    page = Page(sweep)
    assert sweep.page.stat().st_size < 1e6
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "image")
        assert "src" not in attributes
        targets = [value for name, value in attributes.items() if name.endswith("href")]
        assert all(str(value).startswith("#") for value in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))
    policy = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert "default-src 'none'" in str(policy)


def test_page_drawings_are_well_formed_and_find_what_they_refer_to(sweep: Comparison) -> None:
    page = Page(sweep)
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(drawings) == len(page.descriptions())
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    used = set(re.findall(r"url\(#([^)]+)\)", page.source)) | set(re.findall(r'xlink:href="#([^"]+)"', page.source))
    assert used and used <= ids


def test_page_follows_light_and_dark_colours(sweep: Comparison) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", sweep.page.read_text(), re.DOTALL))
    variables = set(re.findall(r"var\((--[\w]+)\)", drawings))
    assert {"--g0", "--g1", "--ink", "--soft", "--line"} <= variables
    assert not re.findall(r"(?:fill|stroke): #\w+", drawings), "a colour of its own would be lost on one background"
    style = sweep.page.read_text().split("</style>")[0]
    assert all(style.count(f"{variable}:") == 2 for variable in variables), "one for light, one for dark"


def test_figures_are_written_as_png_and_svg(sweep: Comparison) -> None:
    names = {path.stem for path in sweep.figures.glob("*.svg")}
    assert names == {path.stem for path in sweep.figures.glob("*.png")}
    assert {"overview", "clip_fraction", "reward_tokens", "accuracy_time"} <= names
    for path in sweep.figures.glob("*.svg"):
        ElementTree.parse(path)
    for path in sweep.figures.glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 800 and height >= 500


def test_clip_fraction_is_drawn_on_a_logarithmic_axis(sweep: Comparison) -> None:
    (panel,) = [panel for panel in UPDATES if panel.name == "clip_fraction"]
    assert panel.log
    labels = "".join(ElementTree.parse(sweep.figures / "clip_fraction.svg").getroot().itertext())
    assert "10" in labels and "Clipped tokens" in labels


def test_comparison_lies_in_the_folder_that_contains_all_runs(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "x" / "1", tmp_path / "a" / "y" / "2"]
    assert common_folder(runs) == tmp_path / "a"
    assert common_folder(runs[:1]) == tmp_path / "a" / "x"


def test_the_same_runs_give_the_same_page_again(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "runs" / f"{seed}", seed=seed, row=few_figures)
    first, second = (write_comparison([tmp_path / "runs"], tmp_path / name) for name in ("one", "two"))
    assert first.page.read_bytes() == second.page.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["compare.html", "figures"]


@pytest.mark.parametrize("steps", [1, 2, 450])
def test_page_of_one_run(tmp_path: Path, steps: int) -> None:
    write_run(tmp_path / "runs" / "only", steps=steps, max_steps=steps, row=few_figures)
    written = write_comparison([tmp_path / "runs" / "only"])
    page = Page(written)
    assert written.page == tmp_path / "runs" / "compare" / "compare.html"
    assert "one seed: no spread is known" in page.text and "There is one configuration" in page.text
    assert "±" not in page.text


def test_page_without_validation_and_with_runs_of_different_length(tmp_path: Path) -> None:
    def row(step: int) -> dict[str, float]:
        return few_figures(step) | {"rollout/num_tokens": 1000.0}

    for seed, steps in enumerate((20, 6, 0)):
        write_run(tmp_path / "runs" / f"{seed}", seed=seed, steps=steps, row=row)
    page = Page(write_comparison([tmp_path / "runs"]))
    assert not any(text.startswith("Held-out") for text in page.descriptions())
    for part in ("seed 1: ended (or is) at step 6 of 20", "thin: seeds that got further", "no step has been logged"):
        assert part in page.text


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e12, -3.0, float("nan")])
def test_page_draws_constant_and_missing_figures(tmp_path: Path, value: float) -> None:
    names = ("rollout/score_mean", "validation/score_mean", "actor/grad_norm", "rollout/num_tokens", "time/step")
    for seed in range(2):
        write_run(tmp_path / "runs" / f"{seed}", seed=seed, row=lambda step: dict.fromkeys(names, value))
    page = Page(write_comparison([tmp_path / "runs"]))
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page.source, flags=re.DOTALL).lower()


def test_zeros_on_a_logarithmic_axis_are_counted(tmp_path: Path) -> None:
    def row(step: int) -> dict[str, float]:
        return few_figures(step) | {"actor/clip_fraction": 0.0 if step > 15 else 0.01}

    write_run(tmp_path / "runs" / "only", row=row)
    assert "5 values of 0 lie at the lower edge" in Page(write_comparison([tmp_path / "runs"])).text


def test_page_escapes_everything_from_the_runs(tmp_path: Path) -> None:
    for i in range(2):
        run = write_run(tmp_path / "runs" / f"{i}", seed=i, row=few_figures)
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"exp_name": EVIL + "a" * i, EVIL: f"{EVIL}{i}"}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_comparison([tmp_path / "runs"]))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.text.count(EVIL) > 10


def test_many_groups_have_colours_or_dashes_of_their_own(tmp_path: Path) -> None:
    for i in range(9):
        write_run(tmp_path / "runs" / f"{i}", f"pg_clip_low=0.0{i + 1}", steps=3, max_steps=3, row=few_figures)
    written = write_comparison([tmp_path / "runs"])
    assert len({group.label for group in written.groups}) == 9
    drawing = (written.figures / "clip_fraction.svg").read_text()
    for group in written.groups:
        assert group.label in drawing


def test_panels_name_known_metrics_and_files_of_their_own() -> None:
    panels = [*LEARNING, *UPDATES, *OTHERS]
    assert {name for panel in panels for name in panel.metrics} <= set(METRICS)
    assert len({panel.name for panel in panels}) == len(panels)


def test_runs_without_any_step_cannot_be_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "young", steps=0, row=lambda step: {})
    with pytest.raises(DataError, match="no step has been logged yet"):
        write_comparison([tmp_path])


def test_compare_command_line(tmp_path: Path) -> None:
    for seed in range(2):
        row = lambda step, shift=0.02 * seed: few_figures(step) | {"rollout/score_mean": 0.2 + 0.01 * step + shift}  # noqa: E731
        write_run(tmp_path / "runs" / f"{seed}", seed=seed, row=row)
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "roll_gspo.compare"]
    good = subprocess.run([*command, str(runs), "--out", str(tmp_path / "page")], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    for part in ("example_gspo", "seed 0, 1", "0.390 ± 0.014", "0.380 0.400", str(tmp_path / "page" / "compare.html")):
        assert part in good.stdout
    assert (tmp_path / "page" / "figures" / "overview.png").is_file()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in (
        ([str(tmp_path / "empty")], "no run in it or below it"),
        ([str(tmp_path / "gone")], "no such folder"),
        ([str(runs), "--out", str(tmp_path / "file")], "--out FOLDER writes elsewhere"),
    ):
        bad = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert bad.returncode == 2
        assert message in bad.stderr and "Traceback" not in bad.stderr
