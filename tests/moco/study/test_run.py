"""The study's runs: in order, each once, shared by processes, gone on with after a stop."""

import json
import signal
from pathlib import Path

import pytest

from moco.study import fake_runs
from moco.study.fake_runs import Record
from shuffle_batchnorm.moco.checkpoint import CheckpointError, folder_lock
from shuffle_batchnorm.moco.comparison.summary import ResultsError
from shuffle_batchnorm.moco.config import Config, ConfigError
from shuffle_batchnorm.moco.ranks.spawn import Stopped
from shuffle_batchnorm.moco.study import run
from shuffle_batchnorm.moco.study.cells import chosen
from shuffle_batchnorm.moco.study.page import write_page
from shuffle_batchnorm.moco.study.records import Records
from shuffle_batchnorm.moco.study.run import study

CELLS = chosen("n8-B1,n8-B2,n16-B2")


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> list[list[Record]]:
    """Notes what pages were written of: they have tests of their own, and take seconds."""
    written: list[list[Record]] = []

    def write_page(output: Path, records: Records, *, command: str) -> Path:
        assert command
        written.append(records.runs)
        return output / "study.html"

    monkeypatch.setattr(run, "write_page", write_page)
    return written


class Trainer:
    """Trains as `fake_runs.train`, notes what, and is stopped at one of the runs."""

    def __init__(self, stop_at: str = "") -> None:
        self.trained: list[str] = []
        self.stop_at = stop_at

    def __call__(self, config: Config) -> Record:
        name = config.run.output.name
        if name == self.stop_at:
            raise Stopped(signal.SIGTERM, "stopped")
        self.trained.append(name)
        return fake_runs.train(config)


def names(path: Path) -> list[str]:
    records = json.loads(path.read_text())["records"]
    return [f"{record['cell']}-seed{record['seed']}" for record in records]


def test_an_interrupted_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Trainer("n16-B2-seed10"), Trainer()
    with pytest.raises(Stopped):
        study(tmp_path, (10, 11), CELLS, train=first)
    assert first.trained == names(tmp_path / "records.json") == ["n8-B1-seed10", "n8-B2-seed10"]
    records = study(tmp_path, (10, 11), CELLS, train=second)
    rest = ["n16-B2-seed10", "n8-B1-seed11", "n8-B2-seed11", "n16-B2-seed11"]
    assert second.trained == rest
    assert [f"{r['cell']}-seed{r['seed']}" for r in records.runs] == first.trained + rest
    out, err = capsys.readouterr()
    assert "study: 6 runs, 2 have ended before\nstudy: [3/6] n16-B2, seed 10: leak 0." in err
    assert out.startswith("The page: ")


def test_what_another_process_trains_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an error, and a wait, where a second command is started beside a first."""
    trainer = Trainer()
    with folder_lock(tmp_path / "runs" / "n8-B2-seed10"):
        study(tmp_path, (10,), CELLS, train=trainer)
    assert trainer.trained == ["n8-B1-seed10", "n16-B2-seed10"]
    assert "study: other processes are training n8-B2-seed10\n" in capsys.readouterr().err
    study(tmp_path, (10,), CELLS, train=trainer)
    assert trainer.trained[2:] == ["n8-B2-seed10"]


def test_a_run_that_another_process_has_left_is_taken_up(tmp_path: Path) -> None:
    """Catches a study that ends although a run, held when it came by, is free at its end."""
    held = folder_lock(tmp_path / "runs" / "n8-B1-seed10")
    held.__enter__()

    class Releasing(Trainer):
        def __call__(self, config: Config) -> Record:
            if not self.trained:
                held.__exit__(None, None, None)
            return super().__call__(config)

    trainer = Releasing()
    study(tmp_path, (10,), CELLS, train=trainer)
    assert trainer.trained == ["n8-B2-seed10", "n16-B2-seed10", "n8-B1-seed10"]


def test_earlier_records_are_not_trained_again(tmp_path: Path) -> None:
    study(tmp_path / "a", (10,), CELLS[:2], train=Trainer())
    trainer = Trainer()
    records = study(
        tmp_path / "b", (10,), CELLS, earlier=tmp_path / "a" / "records.json", train=trainer
    )
    assert trainer.trained == ["n16-B2-seed10"]
    assert [record["cell"] for record in records.runs] == ["n8-B1", "n8-B2", "n16-B2"]
    assert names(tmp_path / "b" / "records.json") == [
        "n8-B1-seed10",
        "n8-B2-seed10",
        "n16-B2-seed10",
    ]


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match="study: its runs are of one process each"):
        study(tmp_path, (10,), CELLS)
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_is_missing_is_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a study that ends where one data set is missing, or says nothing of it."""
    trainer = Trainer()
    cells = chosen("n8-B1,fashion-n8-*")
    study(tmp_path, (10,), cells, data_path=tmp_path / "none", train=trainer)
    assert trainer.trained == ["n8-B1-seed10"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "without" in line]
    assert line.startswith("study: without the cells of fashion-mnist: train: --data-path ")
    assert "dataset-fashion-mnist" in line


def test_a_page_from_committed_records_alone(tmp_path: Path, pages: list[list[Record]]) -> None:
    """Catches runs, and folders for runs, where only the page was asked for."""
    study(tmp_path / "a", (10,), CELLS[:2], train=Trainer())
    trainer = Trainer()
    earlier = tmp_path / "a" / "records.json"
    records = study(tmp_path / "b", (10,), CELLS, earlier=earlier, report_only=True, train=trainer)
    assert not trainer.trained
    assert pages == [records.runs] * 2
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"records.json"}


@pytest.mark.parametrize("report_only", [True, False])
def test_records_that_are_not_there_are_an_error(report_only: bool, tmp_path: Path) -> None:
    """Catches a wrong path after which all is trained again."""
    trainer, nowhere = Trainer(), tmp_path / "none.json"
    with pytest.raises(CheckpointError, match=r"can't read .*none\.json: No such file"):
        study(tmp_path, (10,), CELLS, earlier=nowhere, report_only=report_only, train=trainer)
    assert not trainer.trained


def test_a_page_of_nothing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong --output that ends as if there were a page."""
    monkeypatch.setattr(run, "write_page", write_page)
    with pytest.raises(ResultsError, match="holds no record"):
        study(tmp_path, (10,), CELLS, report_only=True)
