"""Where the numbers are from, and that nothing is claimed where nobody noted it."""

import json
from pathlib import Path

import pytest

from moco.comparison.made_up import Record, made_up_record
from shuffle_batchnorm.moco.checkpoint import CheckpointError
from shuffle_batchnorm.moco.comparison.provenance import UNKNOWN, provenance, with_origin

SILENT = "unknown: the records do not say"
KNOWN = made_up_record(
    begun="2026-11-27T23:00:00+00:00",
    commits=["8fd9b07c57ab59f3d36e3dd5140fa23b14776dbf"],
    versions={"shuffle_batchnorm": ["0.1.0"], "torch": ["2.13.0+cpu"]},
    device="cpu",
    train_images=60000,
    test_images=10000,
    parameters=72880,
)


def start(commit: str | None, torch: str, time: str = "2026-11-28T08:26:00+00:00") -> Record:
    return {"time": time, "commit": commit, "versions": {"torch": torch, "shuffle_batchnorm": "1"}}


def test_a_record_is_told_of_its_runs_starts(tmp_path: Path) -> None:
    """Catches the last start alone: a resumed run is of two commits."""
    starts = [start("a", "2.12"), start("a", "2.13", "later"), start("b+", "2.13", "later")]
    (tmp_path / "config.json").write_text(json.dumps({"starts": starts}))
    record = with_origin({"bn": "local"}, tmp_path)
    assert record == {
        "bn": "local",
        "begun": "2026-11-28T08:26:00+00:00",
        "commits": ["a", "b+"],
        "versions": {"shuffle_batchnorm": ["1"], "torch": ["2.12", "2.13"]},
    }
    words = "shuffle_batchnorm 1, commit a, then commit b with uncommitted changes"
    assert provenance([record])["code"] == words
    assert provenance([record])["torch"] == "2.12, then 2.13"


def test_a_run_that_noted_nothing_is_left_as_it_is(tmp_path: Path) -> None:
    assert with_origin({"bn": "local"}, tmp_path) == {"bn": "local"}
    (tmp_path / "config.json").write_text('{"config": {}}')
    assert with_origin({"bn": "local"}, tmp_path) == {"bn": "local"}
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not JSON"):
        with_origin({"bn": "local"}, tmp_path)


def test_rows_of_the_page() -> None:
    assert provenance([KNOWN, KNOWN | {"seed": 1}]) == {
        "code": "shuffle_batchnorm 0.1.0, commit 8fd9b07c57ab",
        "torch": "2.13.0+cpu",
        "date": "2026-11-27",
        "device": "cpu",
        "images": "60,000 training, 10,000 held out",
        "parameters": "72,880 in the query encoder, its head included",
    }


def test_an_installed_package_has_a_version_and_no_commit() -> None:
    words = "shuffle_batchnorm 0.1.0, commit unknown (not run from a git checkout)"
    assert provenance([KNOWN | {"commits": [None]}])["code"] == words


def test_what_no_record_says_is_unknown() -> None:
    assert set(provenance([made_up_record(), {"bn": "x", "seed": 0}]).values()) == {SILENT}


def test_what_some_do_not_say_is_unknown_of_these() -> None:
    """Catches a date or a commit of some runs that passes for that of all."""
    other = KNOWN | {"begun": "2026-11-28T01:00:00+00:00"}
    rows = provenance([KNOWN, made_up_record(), other])
    assert rows["date"] == f"2026-11-27; 2026-11-28; {UNKNOWN} for 1 of 3 runs"
    assert rows["device"] == f"cpu; {UNKNOWN} for 1 of 3 runs"
