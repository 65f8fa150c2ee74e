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
from shuffle_batchnorm.probe import progress
from shuffle_batchnorm.probe.progress import Console


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


def test_a_log_tells_the_last_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches figures on stdout, and a kNN accuracy that is forgotten at the next row."""
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    book = Journal(small_config(tmp_path, epochs=12), 1, 20, 0, [], Console("train", shown=True))
    book.on_step()
    assert capsys.readouterr() == ("", "")
    book.on_epoch(epoch(2) | {"loss": 1.23456, "samples_per_second": 99.6})
    book.on_step()
    out, err = capsys.readouterr()
    figures = "loss 1.235, pretext 1.500, kNN 0.500, epoch 2 of 12, 100 samples/s"
    assert err.startswith("train:  10 %, step 2 of 20, 0:")
    assert err.endswith(f" left; {figures}\n")
    book.on_window(window(3))
    for _ in range(2):
        book.on_step()
    err = capsys.readouterr().err
    assert err.endswith("loss 0.333, pretext 0.250, kNN 0.500, epoch 1 of 12, 100 samples/s\n")
    assert out == ""


def test_the_bar_comes_back_after_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches "saving" or "kNN" that stays on the screen while a slow step is taken."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "REDRAW", 60.0)
    console = Console("train")
    book = Journal(small_config(tmp_path), 1, 40, 10, [epoch(1)], console)
    console.status("kNN: encoding images")
    book.on_epoch(epoch(2))
    console.status("saving best.pt")
    book.show()
    drawn = capsys.readouterr().err.split("\r\x1b[K")
    assert [line[:12] for line in drawn[1:]] == [
        "train: [##..", "train: kNN: ", "train: [##..", "train: savin", "train: [##..",
    ]  # fmt: skip


def test_a_resumed_run_remembers_its_knn(tmp_path: Path) -> None:
    book = Journal(small_config(tmp_path), 1, 40, 30, [epoch(1), epoch(2), epoch(3)])
    book.on_window(window(31))
    assert "kNN 0.500" in book._bar.text


def test_full_disk_while_a_row_is_written(tmp_path: Path) -> None:
    table = journal.Table(tmp_path / "log.csv", ("a",))
    table.path = Path("/dev/full")
    with pytest.raises(CheckpointError, match="can't write /dev/full: No space left"):
        table.append({"a": 1})
