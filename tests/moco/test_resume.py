"""Runs go on, also from a damaged checkpoint, and those begun by earlier versions.

`old_runs/` was written by commit 67f698a. It holds a comparison of `local` and `regroup` in
float64, whose second run was killed at step 14 of 22, two steps after its last checkpoint;
`uninterrupted.*` is what that version made of the same run when nothing stopped it.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from moco.moco_runs import (
    TIMED,
    differences,
    small_config,
    timeless_rows,
    train_quickly,
    without_times,
)
from shuffle_batchnorm.moco.checkpoint import CheckpointError, load
from shuffle_batchnorm.moco.comparison import compare as module
from shuffle_batchnorm.moco.comparison.compare import compare
from shuffle_batchnorm.moco.config import Config, from_dict
from shuffle_batchnorm.moco.journal import outcome

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
        assert value.keys() >= expected.keys(), where  # later versions may say more
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
    old = json.loads((OLD / "runs" / "local-seed0" / "record.json").read_text())
    assert ended.items() >= old.items()  # when it was begun, and by which commit, is added
    run = tmp_path / "runs" / "regroup-seed0"
    expected = json.loads((OLD / "uninterrupted.json").read_text())
    ended_at = load(run / "last.pt")
    assert ended_at["step"] == 22
    assert ended_at["best_knn"] == expected["curve"][0]["knn"]  # before the checkpoint
    assert_close(resumed, expected)
    assert json.loads((run / "record.json").read_text()).items() <= resumed.items()
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


def test_a_damaged_checkpoint_costs_a_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeued job goes on from the one before it, and ends the same.

    Catches a damaged file that takes the place of the whole one at the next checkpoint, and one
    that is moved by a run that is refused.
    """
    whole, folder = tmp_path / "whole", tmp_path / "damaged"
    train_quickly(small_config(whole, epochs=1, save_every=3))  # of 11 steps
    shutil.copytree(whole, folder)
    (folder / "record.json").unlink()
    last = folder / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"last\.previous\.pt was begun with another --lr"):
        train_quickly(small_config(folder, epochs=1, resume=True, lr=0.5))
    assert not (folder / "last.damaged.pt").exists()
    capsys.readouterr()
    train_quickly(small_config(folder, epochs=1, save_every=3, resume=True))
    out, err = capsys.readouterr()
    said = f"checkpoint: {last} is damaged; it is last.damaged.pt now"
    assert f"train: warning: {said}, and the run goes on from last.previous.pt\n" in err
    assert f"train: from step 9 of 11 steps, to {folder}\n" in err
    assert out == ""
    one, other = (without_times(load(path / "last.pt")) for path in (whole, folder))
    assert differences(one, other) == []
    assert load(folder / "last.previous.pt")["step"] == 9
    assert timeless_rows(whole / "steps.csv") == timeless_rows(folder / "steps.csv")


def test_a_run_that_had_ended_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, epochs=1, resume=True)
    record = train_quickly(config)
    capsys.readouterr()
    assert train_quickly(config) == record
    out, err = capsys.readouterr()
    assert err == f"train: reading digits\ntrain: the run in {tmp_path} had ended before\n"
    assert out == ""


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"config": []}', "\x00\xff"])
def test_other_damaged_files_of_a_run(tmp_path: Path, text: str) -> None:
    """Catches tracebacks, and a run that begins anew over one that had ended."""
    whole = tmp_path / "whole"
    train_quickly(small_config(whole, epochs=1))
    for name in ("record.json", "config.json"):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match=rf"{name} (is damaged, or not of|is not JSON)"):
            train_quickly(small_config(folder, epochs=1, resume=True))


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a,b\n1,2\n", b"step,loss\nx,1\n"])
def test_damaged_steps_are_named(tmp_path: Path, text: bytes) -> None:
    """Catches a traceback of the csv module."""
    train_quickly(small_config(tmp_path, epochs=1, save_every=3))
    (tmp_path / "record.json").unlink()
    (tmp_path / "steps.csv").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"steps\.csv is damaged; remove it"):
        train_quickly(small_config(tmp_path, epochs=1, save_every=3, resume=True))


LEAK = {
    "leak": 0.25, "leak_interval": [0.125, 0.5], "leak_as_trained": 0.75, "leak_fresh": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"knn": None, **LEAK},
            "kNN left out, leak 0.2500 (95 % interval 0.1250 to 0.5000): top-1 0.7500 as trained",
        ),
        ({"knn": 0.5, "linear": 0.25, "leak": None}, "kNN 0.5000, linear probe 0.2500, it has div"),
    ],
)
def test_outcomes(record: dict[str, Any], expected: str) -> None:
    assert outcome(record).startswith(expected)
