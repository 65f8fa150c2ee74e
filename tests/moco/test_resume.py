"""Runs begun by earlier versions go on: `old_runs/` was written by commit 67f698a.

It holds a comparison of `local` and `regroup` in float64, whose second run was killed at step 14
of 22, two steps after its last checkpoint; `uninterrupted.*` is what that version made of the same
run when nothing stopped it.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from moco.moco_runs import TIMED, timeless_rows
from shuffle_batchnorm.moco.checkpoint import CheckpointError, load
from shuffle_batchnorm.moco.comparison import compare as module
from shuffle_batchnorm.moco.comparison.compare import compare
from shuffle_batchnorm.moco.config import Config, from_dict

OLD = Path(__file__).parent / "old_runs"


def create_model(name: str, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
    """The network of these runs, small enough for its checkpoints to lie here."""
    assert (name, pretrained, num_classes) == ("tiny", False, 0)
    first = [nn.Conv2d(in_chans, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6))


def copied(folder: Path) -> Config:
    """Put the old comparison into a folder; return its configuration."""
    shutil.copytree(OLD, folder, dirs_exist_ok=True)
    return from_dict(json.loads((folder / "comparison.json").read_text())["config"])


def assert_close(value: Any, expected: Any, where: str = "record") -> None:
    """Equal, but for times and for what the kernels of another version round otherwise."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), where
        for key in expected.keys() - TIMED:
            assert_close(value[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(value) == len(expected), where
        for position, pair in enumerate(zip(value, expected, strict=True)):
            assert_close(*pair, f"{where}/{position}")
    else:
        assert type(value) is type(expected), where
        is_float = isinstance(expected, float)
        assert value == (pytest.approx(expected, rel=1e-6) if is_float else expected), where


def test_an_old_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key of a checkpoint, a field of a record, a column or a file with another name."""
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    monkeypatch.setattr(module, "write_report", lambda output, *_, **__: output)
    config = copied(tmp_path)
    ended, resumed = compare(config, ["local", "regroup"], [0], tmp_path, command="")
    assert ended == json.loads((OLD / "runs" / "local-seed0" / "record.json").read_text())
    run = tmp_path / "runs" / "regroup-seed0"
    expected = json.loads((OLD / "uninterrupted.json").read_text())
    ended_at = load(run / "last.pt")
    assert ended_at["step"] == 22
    assert ended_at["best_knn"] == expected["curve"][0]["knn"]  # before the checkpoint
    assert_close(resumed, expected)
    assert json.loads((run / "record.json").read_text()) == resumed
    steps, old_steps = (
        timeless_rows(path) for path in (run / "steps.csv", OLD / "uninterrupted.csv")
    )
    assert steps[0] == old_steps[0]
    for row, old_row in zip(steps[1:], old_steps[1:], strict=True):
        assert list(map(float, row)) == pytest.approx(list(map(float, old_row)), rel=1e-6)
    starts = json.loads((run / "config.json").read_text())["starts"]
    assert len(starts) == 2
    assert not list(run.glob(".lock"))


def test_an_old_comparison_of_something_else_is_refused(tmp_path: Path) -> None:
    config = copied(tmp_path)
    (tmp_path / "comparison.json").unlink()
    other = from_dict({"optim": {"lr": 0.5}})
    with pytest.raises(CheckpointError, match=r"local-seed0/config.json was begun with another "):
        compare(other, ["local"], [0], tmp_path, command="")
    assert config.optim.lr == 0.12
