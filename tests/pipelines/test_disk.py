"""Free disk space against the size of a checkpoint."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from composed import load_config

from roll_gspo.errors import ConfigError
from roll_gspo.pipelines import disk


def test_first_checkpoint_must_fit_and_a_second_one_should(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("example_gspo").config
    size = disk.checkpoint_bytes(config)
    assert size == 625_024 * (12 + 4), "weight and moments in float32, and the export"
    free = [0.5 * size, 1.5 * size, 2.5 * size]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    with pytest.raises(ConfigError, match=r"^output_dir: a checkpoint takes about .* GiB, and .* GiB free; free space"):
        disk.check_disk(config)
    assert disk.disk_warnings(config) == []
    for amount, count in ((free[1], 1), (free[2], 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, amount=amount: SimpleNamespace(free=amount))
        disk.check_disk(config)
        assert len(disk.disk_warnings(config)) == count
