from __future__ import annotations

import html
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from compared_runs import two_metrics, write_run, write_sweep
from parsed_page import ParsedPage

from roll_gspo.compare.page import Comparison, common_folder, write_comparison
from roll_gspo.compare.panels import LEARNING, OTHERS, UPDATES
from roll_gspo.errors import DataError
from roll_gspo.printable import printable_line
from roll_gspo.tracking.names import METRICS

EVIL = "<script>alert('&')</script>\"><img src=x onerror=alert(1)>"


def parsed(written: Comparison) -> ParsedPage:
    return ParsedPage(written.page.read_text())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return write_comparison([write_sweep(tmp_path_factory.mktemp("output") / "example_gspo")])


def test_page_shows_rewards_and_accuracy_against_steps_tokens_and_time(sweep: Comparison) -> None:
    descriptions = parsed(sweep).descriptions()
    for title in ("Training reward", "Held-out accuracy"):
        for axis in ("training step", "generated tokens", "wall time"):
            assert sum(text.startswith(f"{title} against {axis}. ") for text in descriptions) == 1
    for title in ("Clipped tokens", "Deviation of the importance ratio", "Entropy", "Response length", "Gradient norm"):
        assert sum(text.startswith(title) for text in descriptions) == 1


def test_captions_explain_mean_and_band(sweep: Comparison) -> None:
    page = parsed(sweep)
    (accuracy,) = [t for t in page.descriptions() if t.startswith("Held-out accuracy against training step")]
    assert "gspo: from 0.3 to 0.52 (0.5 to 0.54)" in accuracy
    assert accuracy.endswith("Mean of 3 seeds, band: minimum to maximum; dots: single seeds.")
    (reward,) = [t for t in page.descriptions() if t.startswith("Training reward against training step")]
    assert "trailing mean of 5 steps" in reward
    assert page.text.count("Mean of 3 seeds, band: minimum to maximum") == len(page.descriptions())


def test_page_has_the_table_and_the_configuration_diff(sweep: Comparison) -> None:
    text = parsed(sweep).text
    for part in ("0.400 ± 0.020", "seed 2", "importance_sampling", "pg_clip_high", "seq\n", "token\n"):
        assert part in text
    assert "Caveats" not in text
    assert "run_name" not in text and "output_dir" not in text


def test_page_needs_no_network(sweep: Comparison) -> None:
    page = parsed(sweep)
    assert sweep.page.stat().st_size < 6e5
    page.check_loads_nothing()


def test_charts_have_a_line_with_a_band_per_group_and_the_single_seeds(sweep: Comparison) -> None:
    charts = parsed(sweep).charts()
    assert all(chart["x"] and chart["y"] for chart in charts)
    (accuracy,) = [c for c in charts if c["title"] == "Held-out accuracy" and c["x"] == "step"]
    gspo, grpo, *seeds = accuracy["series"]
    assert (gspo["label"], grpo["label"]) == ("gspo", "grpo")
    assert (gspo["x"], gspo["y"]) == ([0, 10, 20], pytest.approx([0.3, 0.42, 0.52]))
    assert (gspo["low"][-1], gspo["high"][-1]) == pytest.approx((0.5, 0.54))
    assert [one["partOf"] for one in seeds] == [0, 0, 0, 1, 1, 1] and {one["style"] for one in seeds} == {"points"}
    assert seeds[0]["label"] == "gspo, 000_algorithm-gspo_seed-0"


def test_page_has_a_chart_of_every_metric_and_links_reports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs #1" / "first", row=lambda step: two_metrics(step) | {"custom/odd": 1.0})
    (run / "report.html").touch()
    page = parsed(write_comparison([run]))
    page.check_loads_nothing()
    assert "custom/odd" in [chart["title"] for chart in page.charts()]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["../first/report.html"]


def test_plots_are_written_as_png_and_svg(sweep: Comparison) -> None:
    names = {path.stem for path in sweep.plots.glob("*.svg")}
    assert names == {path.stem for path in sweep.plots.glob("*.png")}
    assert {"overview", "clip_fraction", "reward_tokens", "accuracy_time"} <= names
    for path in sweep.plots.glob("*.svg"):
        ElementTree.parse(path)
    for path in sweep.plots.glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 800 and height >= 500


def test_clip_fraction_is_drawn_on_a_logarithmic_axis(sweep: Comparison) -> None:
    (panel,) = [panel for panel in UPDATES if panel.name == "clip_fraction"]
    assert panel.log
    labels = "".join(ElementTree.parse(sweep.plots / "clip_fraction.svg").getroot().itertext())
    assert "10" in labels and "Clipped tokens" in labels


def test_comparison_is_in_the_folder_that_contains_all_runs(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "x" / "1", tmp_path / "a" / "y" / "2"]
    assert common_folder(runs) == tmp_path / "a"
    assert common_folder(runs[:1]) == tmp_path / "a" / "x"


def test_same_runs_give_the_same_page(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "runs" / f"{seed}", seed=seed, row=two_metrics)
    first, second = (write_comparison([tmp_path / "runs"], tmp_path / name) for name in ("one", "two"))
    assert first.page.read_bytes() == second.page.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["compare.html", "figures"]


@pytest.mark.parametrize("steps", [1, 2, 450])
def test_page_of_one_run(tmp_path: Path, steps: int) -> None:
    write_run(tmp_path / "runs" / "only", steps=steps, max_steps=steps, row=two_metrics)
    written = write_comparison([tmp_path / "runs" / "only"])
    page = parsed(written)
    assert written.page == tmp_path / "runs" / "compare" / "compare.html"
    assert "One seed, spread unknown" in page.text and "same configuration" in page.text
    assert "±" not in page.text


def test_page_without_validation_and_with_runs_of_different_length(tmp_path: Path) -> None:
    def row(step: int) -> dict[str, float]:
        return two_metrics(step) | {"rollout/num_tokens": 1000.0}

    for seed, steps in enumerate((20, 6, 0)):
        write_run(tmp_path / "runs" / f"{seed}", seed=seed, steps=steps, row=row)
    page = parsed(write_comparison([tmp_path / "runs"]))
    assert not any(text.startswith("Held-out") for text in page.descriptions())
    for part in ("seed 1", "step 6 of 20", "thin lines: seeds", "no step has been logged"):
        assert part in page.text


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e12, -3.0, float("nan")])
def test_page_draws_constant_and_missing_values(tmp_path: Path, value: float) -> None:
    names = ("rollout/score_mean", "validation/score_mean", "actor/grad_norm", "rollout/num_tokens", "time/step")
    for seed in range(2):
        write_run(tmp_path / "runs" / f"{seed}", seed=seed, row=lambda step: dict.fromkeys(names, value))
    page = parsed(write_comparison([tmp_path / "runs"]))
    assert "nan" not in str(page.charts()).lower()


@pytest.mark.parametrize("name", ["_$\\frac{$", "$a$ \x1b[2J\u202e\ud800 {}\\"])
def test_any_name_of_a_run_can_be_plotted(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", steps=2, max_steps=2, row=lambda step: {"actor/entropy": 1.0})
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"exp_name": name, "run_name": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    written = write_comparison([run])
    svg = (written.plots / "entropy.svg").read_text()
    assert printable_line(name) in html.unescape(svg) and printable_line(name) in parsed(written).text


def test_page_escapes_everything_from_the_runs(tmp_path: Path) -> None:
    for i in range(2):
        run = write_run(tmp_path / "runs" / f"{i}", seed=i, row=two_metrics)
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"exp_name": EVIL + "a" * i, "run_name": None}
        config[EVIL] = f"{EVIL}{i}"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = parsed(write_comparison([tmp_path / "runs"]))
    assert page.names().count("script") == 1 and "img" not in page.names()
    assert page.text.count(EVIL) > 10


def test_more_groups_than_colors_are_in_the_legend(tmp_path: Path) -> None:
    for i in range(9):
        write_run(tmp_path / "runs" / f"{i}", f"pg_clip_low=0.0{i + 1}", steps=3, max_steps=3, row=two_metrics)
    written = write_comparison([tmp_path / "runs"])
    assert len({group.label for group in written.groups}) == 9
    svg = (written.plots / "clip_fraction.svg").read_text()
    for group in written.groups:
        assert group.label in svg


def test_panels_have_known_metrics_and_unique_names() -> None:
    panels = [*LEARNING, *UPDATES, *OTHERS]
    assert {name for panel in panels for name in panel.metrics} <= set(METRICS)
    assert len({panel.name for panel in panels}) == len(panels)


def test_runs_without_any_step_are_an_error(tmp_path: Path) -> None:
    write_run(tmp_path / "young", steps=0, row=lambda step: {})
    with pytest.raises(DataError, match="no step has been logged yet"):
        write_comparison([tmp_path])


def test_compare_command_line(tmp_path: Path) -> None:
    for seed in range(2):
        row = lambda step, shift=0.02 * seed: two_metrics(step) | {"rollout/score_mean": 0.2 + 0.01 * step + shift}  # noqa: E731
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
