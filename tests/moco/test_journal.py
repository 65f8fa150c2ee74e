"""What a run writes for people."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moco.moco_runs import small_config
from shuffle_batchnorm.moco import journal
from shuffle_batchnorm.moco.checkpoint import CheckpointError
from shuffle_batchnorm.moco.config import from_dict
from shuffle_batchnorm.moco.journal import EPOCH_COLUMNS, Journal, commit


def window(step: int) -> dict[str, Any]:
    rate = {"lr": 0.1, "samples_per_second": 100.0}
    return {"step": step, "epoch": 1, "loss": 1 / 3, "pretext_accuracy": 0.25, **rate}


def epoch(number: int) -> dict[str, Any]:
    knn = 0.5 if number == 2 else None
    return dict.fromkeys(EPOCH_COLUMNS, 1.5) | {"epoch": number, "step": 10 * number, "knn": knn}


def test_goes_on_without_lost_or_repeated_rows(tmp_path: Path) -> None:
    """What was written after the checkpoint goes, also a line that a crash has cut."""
    first = Journal(small_config(tmp_path), 2, 40, 0, [])
    for step in (5, 10, 15):
        first.on_window(window(step))
    first.on_epoch(epoch(1))
    first.close()
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("20,1,0.3")
    second = Journal(small_config(tmp_path, resume=True), 2, 40, 10, [epoch(1)])
    second.on_window(window(15))
    second.on_epoch(epoch(2))
    second.close()
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "5", "10", "15"]
    assert lines[1].split(",")[2] == repr(1 / 3)  # all digits
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(EPOCH_COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]
    assert [line.split(",")[4] for line in lines[1:]] == ["", "0.5"]
    described = json.loads((tmp_path / "config.json").read_text())
    assert len(described["starts"]) == 2


def test_row_cut_within_its_last_number(tmp_path: Path) -> None:
    """All columns are there, but the last number isn't whole; its step is after the checkpoint."""
    first = Journal(small_config(tmp_path), 1, 40, 0, [])
    first.on_window(window(5))
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("10,1,0.3,0.2,0.1,9")
    second = Journal(small_config(tmp_path, resume=True), 1, 40, 7, [])
    second.on_window(window(10))
    steps = [line.split(",")[0] for line in (tmp_path / "steps.csv").read_text().splitlines()]
    assert steps == ["step", "5", "10"]


def test_describes_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, bn="swap")
    Journal(config, 3, 40, 0, []).close()
    described = json.loads((tmp_path / "config.json").read_text())
    assert from_dict(described["config"]) == config
    assert described["world_size"] == 3
    [start] = described["starts"]
    assert {"torch", "python", "shuffle_batchnorm"} <= start["versions"].keys()
    assert {"command", "time", "commit"} <= start.keys()


def test_the_commit_is_of_the_library_not_of_the_folder_it_is_installed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the commit of a user's own project, in whose .venv the library is."""

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    (tmp_path / "own.py").touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(journal, "__file__", str(tmp_path / "own.py"))
    name = commit()
    assert name is not None
    assert re.fullmatch("[0-9a-f]{40}", name)
    (tmp_path / "own.py").write_text("changed")
    assert commit() == f"{name}+"
    (tmp_path / "journal.py").touch()
    monkeypatch.setattr(journal, "__file__", str(tmp_path / "journal.py"))
    assert commit() is None


def test_one_line_per_epoch_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = Journal(small_config(tmp_path, epochs=12), 1, 120, 0, [])
    book.on_window(window(5))
    book.on_step()
    book.on_epoch(epoch(2) | {"seconds": 40.0, "loss": 1.23456, "samples_per_second": 99.6})
    out, err = capsys.readouterr()
    assert out == "[ 2/12] loss 1.235, pretext 1.500, kNN 0.500, 100 samples/s, 0:03:20 left\n"
    assert err == ""


def test_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    book = Journal(small_config(tmp_path), 1, 40, 10, [epoch(1)])
    book.on_window(window(15))
    for _ in range(30):
        book.on_step()
    book.on_epoch(epoch(2))
    book.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "40/40" in err
    assert "loss 0.333, pretext 0.250, 100 samples/s" in err


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    book = Journal(small_config(tmp_path, tensorboard=True), 1, 40, 0, [])
    book.on_window(window(5))
    book.on_epoch(epoch(2))
    book.close()
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/pretext_accuracy")] == [(5, 0.25)]
    assert [(e.step, e.value) for e in board.Scalars("test/knn")] == [(20, 0.5)]


def test_full_disk_while_a_row_is_written(tmp_path: Path) -> None:
    table = journal.Table(tmp_path / "log.csv", ("a",))
    table.path = Path("/dev/full")
    with pytest.raises(CheckpointError, match="can't write /dev/full: No space left"):
        table.append({"a": 1})
