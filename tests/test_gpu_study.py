"""`make gpu-study`: side by side, each run with its limit, and one summary of all that ended."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import gpu_check
import gpu_study
import pytest
import torch

from shuffle_batchnorm.moco import cli
from shuffle_batchnorm.moco.config import validate

COMMON = {"leak_interval": [0.2, 0.4], "linear": 0.9, "pretext_accuracy": 0.5}
COMMON |= {"loss": 1.0, "samples_per_second": 100.0}


def _record(bn: str, seed: int, leak: float | None, knn: float | None) -> dict[str, Any]:
    return {"bn": bn, "seed": seed, "leak": leak, "knn": knn, **COMMON}


def _plant(runs: Path, *records: dict[str, Any]) -> None:
    for one in records:
        folder = runs / f"{one['bn']}-seed{one['seed']}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(one))


def _main(folder: Path, *words: str) -> int:
    places = ["--out", str(folder / "out"), "--runs", str(folder / "runs")]
    return gpu_study.main(["--tiny", *places, *words])


def _squeezed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return summary


def test_a_run_ends_in_the_table_beside_those_of_earlier_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a flag, a package or a record that only a lease of a GPU would have shown."""
    _plant(tmp_path / "runs", _record("local", 3, 0.3, 0.9))
    words = ["--bn", "regroup", "--seeds", "3"]
    assert _main(tmp_path, *words) == 0
    summary = _summary(tmp_path)
    assert [(row["bn"], row["seed"]) for row in summary["rows"]] == [("local", 3), ("regroup", 3)]
    assert "kNN" in (tmp_path / "out" / "regroup-seed3.log").read_text()
    assert {"| `local` |", "| `regroup` |"} <= set(re.findall(r"\| `\w+` \|", _squeezed(capsys)))


def test_a_run_that_fails_is_told_and_the_others_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a study that is green with a run missing, or lost because of it."""
    _plant(tmp_path / "runs", _record("local", 0, None, 0.9) | {"leak_interval": None})
    bad = gpu_check.Part("bad", [sys.executable, "-c", "raise SystemExit(3)"], 60.0)
    monkeypatch.setattr(gpu_study, "run_parts", lambda *_: [bad])
    assert _main(tmp_path) == 1
    assert [row["bn"] for row in _summary(tmp_path)["rows"]] == ["local"]
    outcomes = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert [row["outcome"] for row in outcomes] == ["FAILED"]
    assert "| `local` | – | – |" in _squeezed(capsys), "a run that diverged has no leak"


def test_missing_packages_are_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches four runs that fail one after another where there is no network to fix it."""
    monkeypatch.setitem(gpu_study.NEEDED, "no_such_module", "no-such-package")
    assert _main(tmp_path) == 1
    assert "-m pip install no-such-package\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an hour of a CPU, or a silent success where nothing was trained."""
    assert gpu_study.main([]) == 1
    assert "NOTHING WAS TRAINED" in capsys.readouterr().out


def test_the_trainer_takes_the_settings(tmp_path: Path) -> None:
    """Catches, without a GPU, a flag that the trainer doesn't know or refuses."""
    arguments = gpu_study.parse(["--dataset", "cifar10", "--data-path", str(tmp_path)])
    parts = gpu_study.run_parts(arguments, tmp_path)
    assert len(parts) == 4
    for part in parts:
        act: Any = cli._parse(part.command[3:])
        validate(act.__self__, world_size=1)
        assert act.__self__.data.data_path == tmp_path
        assert act.__self__.run.device == "cuda"
