"""Which runs a comparison starts, in which order, and what it keeps; nothing is trained here."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moco.comparison.made_up import Record, diverged_record, made_up_record
from shuffle_batchnorm.moco.checkpoint import CheckpointError
from shuffle_batchnorm.moco.comparison import compare as module
from shuffle_batchnorm.moco.comparison.summary import ResultsError
from shuffle_batchnorm.moco.config import (
    Config,
    ConfigError,
    Norm,
    NormConfig,
    OptimConfig,
    RunConfig,
    to_dict,
)
from shuffle_batchnorm.moco.ranks.launch import Rank
from shuffle_batchnorm.moco.ranks.spawn import Stopped

CONFIG = Config(norm=NormConfig(groups=16), run=RunConfig(ranks=2, device="cpu"))
ROUND = replace(CONFIG, norm=NormConfig(groups=16, offset=32))
Change = Callable[[Record], Record]
compare = partial(module.compare, command="the command")


class Trainer:
    """Stands in for the trainer: notes what it is asked for and writes what a run leaves."""

    def __init__(self, change: Change = lambda record: record, fail_at: int = -1) -> None:
        self.asked: list[Config] = []
        self.change, self.fail_at = change, fail_at

    def __call__(self, config: Config) -> Record:
        self.asked.append(config)
        folder = config.run.output
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(
            json.dumps({"config": to_dict(config), "world_size": 2})
        )
        if len(self.asked) - 1 == self.fail_at:
            (folder / "record.json").write_text('{"complete": false}')
            raise KeyboardInterrupt
        record = self.change(made_up_record(config.norm.bn, config.run.seed))
        (folder / "record.json").write_text(json.dumps(record))
        return record

    @property
    def runs(self) -> list[tuple[str, int]]:
        return [(config.norm.bn, config.run.seed) for config in self.asked]


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of write_report, in the place of pages, which take seconds."""
    calls: list[dict[str, Any]] = []

    def write_report(output: Path, records: list[Record], **options: Any) -> Path:
        calls.append({"output": output, "records": records, **options})
        return output / "report.html"

    monkeypatch.setattr(module, "write_report", write_report)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process a rank of torchrun that has met the other one."""

    def become(rank: int) -> None:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(module, "launch", lambda function, *args, **_: function(None, *args))

    return become


def results(output: Path) -> list[tuple[str, int]]:
    return [(run["bn"], run["seed"]) for run in json.loads((output / "results.json").read_text())]


def test_runs_are_interleaved_seed_by_seed(tmp_path: Path) -> None:
    """With one bn after the other, a slower hour of the machine would fall on one of them."""
    train = Trainer()
    records = compare(CONFIG, ["local", "regroup"], [3, 1], tmp_path, train=train)
    order = [("local", 3), ("regroup", 3), ("local", 1), ("regroup", 1)]
    assert train.runs == order
    assert [(run["bn"], run["seed"]) for run in records] == order
    assert results(tmp_path) == order
    assert train.asked[1].run.output == tmp_path / "runs" / "regroup-seed3"
    assert all(config.run.resume for config in train.asked)
    assert {config.norm.groups for config in train.asked} == {16}


def test_an_interrupted_comparison_keeps_what_is_done_and_goes_on(tmp_path: Path) -> None:
    first = Trainer(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        compare(CONFIG, ["local", "regroup"], [0, 1], tmp_path, train=first)
    assert results(tmp_path) == [("local", 0), ("regroup", 0)]
    second = Trainer()
    compare(CONFIG, ["local", "regroup"], [0, 1], tmp_path, train=second)
    assert second.runs == [("local", 1), ("regroup", 1)]
    assert len(results(tmp_path)) == 4
    third = Trainer()
    compare(CONFIG, ["local", "regroup"], [0, 1], tmp_path, train=third)
    assert third.runs == []


def test_what_had_ended_stays_in_the_results_while_others_run(tmp_path: Path) -> None:
    compare(CONFIG, ["local"], [0, 1], tmp_path, train=Trainer())
    with pytest.raises(KeyboardInterrupt):
        compare(CONFIG, ["regroup", "local"], [0, 1], tmp_path, train=Trainer(fail_at=1))
    assert results(tmp_path) == [("regroup", 0), ("local", 0), ("local", 1)]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    compare(CONFIG, ["local"], [0], tmp_path, train=Trainer())
    train = Trainer()
    other = replace(CONFIG, optim=OptimConfig(lr=0.1))
    bns: list[Norm] = ["local", "regroup"]
    for bn in bns:  # one that was run, and one that has no run yet
        with pytest.raises(CheckpointError, match=r"another --lr \(was 0.12, is 0.1\); choose"):
            compare(other, [bn], [0], tmp_path, train=train)
    other = replace(CONFIG, run=replace(CONFIG.run, ranks=4))
    with pytest.raises(CheckpointError, match=r"another number of ranks \(was 2, is 4\)"):
        compare(other, ["local"], [0], tmp_path, train=train)
    assert train.asked == []
    free = replace(CONFIG, run=replace(CONFIG.run, save_every=7, log_every=7))
    compare(free, ["local"], [0], tmp_path, train=train)
    assert train.asked == []


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    """Whoever put it there: a run that has ended never reaches the trainer's own check."""
    compare(CONFIG, ["local"], [0], tmp_path, train=Trainer())
    (tmp_path / "comparison.json").unlink()
    other = replace(CONFIG, optim=OptimConfig(lr=0.1))
    with pytest.raises(CheckpointError, match=r"seed0/config\.json was begun with another --lr"):
        compare(other, ["local"], [0], tmp_path, train=Trainer())


def test_a_diverged_run_is_kept_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Trainer(lambda record: diverged_record(record["bn"], record["seed"]))
    (record,) = compare(CONFIG, ["swap"], [0], tmp_path, train=train)
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text  # which is not JSON
    assert record["diverged"] is True
    assert record["loss"] is None
    assert "compare: [1/1] swap, seed 0: diverged" in capsys.readouterr().err
    (again,) = compare(CONFIG, ["swap"], [0], tmp_path, train=Trainer())
    assert again == record


def test_a_record_has_the_commit_and_the_time_of_its_run(tmp_path: Path) -> None:
    """Catches those of the day on which a comparison is gone on with."""

    def train(config: Config) -> Record:
        record = Trainer()(config)
        path = config.run.output / "config.json"
        starts = [{"time": "2026-01-02", "commit": "abc", "versions": {"torch": "2.13.0"}}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"starts": starts}))
        return record

    (record,) = compare(CONFIG, ["local"], [0], tmp_path, train=train)
    assert (record["begun"], record["commits"]) == ("2026-01-02", ["abc"])
    assert json.loads((tmp_path / "results.json").read_text()) == [record]
    assert compare(CONFIG, ["local"], [0], tmp_path, train=Trainer()) == [record]


def test_output_ends_with_table_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pages: list[dict[str, Any]]
) -> None:
    compare(CONFIG, ["local"], [0, 1], tmp_path, train=Trainer(), command="as typed")
    out, err = capsys.readouterr()
    begins, ended, last, _ = err.splitlines()
    assert begins == "compare: [1/2] local, seed 0; next: local, seed 1"
    assert ended.startswith("compare: [1/2] local, seed 0: leak 0.")
    assert last == "compare: [2/2] local, seed 1"
    assert out.startswith("|      bn | ")
    assert "\nlocal: a leak: at least 0." in out
    assert out.splitlines()[-1] == f"The page: {tmp_path / 'report.html'}"
    (page,) = pages
    assert page["command"] == "as typed"
    assert page["setup"]["data"]["image_size"] == 16
    assert page["setup"]["run"]["ranks"] == 2
    assert "seed" not in page["setup"]["run"]
    assert "torch" in page["setup"]["environment"]
    compare(CONFIG, ["local"], [0, 1], tmp_path, train=Trainer())
    again, err = capsys.readouterr()
    assert again == out
    assert err.count("(had ended before)") == len(err.splitlines()) == 2


@pytest.mark.parametrize(("bn", "said"), [("eman", True), ("regroup", False)])
def test_equal_leaks_of_all_seeds_are_no_proof(
    bn: Norm, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches "no leak" of keys that do depend on their batch, but were never found by it."""
    interval = [0.0, 0.0] if bn == "eman" else [-0.01, 0.01]
    none = Trainer(lambda record: record | {"leak": 0.0, "leak_interval": interval})
    compare(CONFIG, [bn], [0, 1, 2], tmp_path, train=none)
    assert (f"\n{bn}: no leak: no key depends" in capsys.readouterr().out) is said


def test_other_ranks_of_torchrun_train_and_are_silent(
    tmp_path: Path, as_rank: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(1)
    train = Trainer(lambda _: cast("Any", None))  # only the first rank has a record
    assert compare(CONFIG, ["local", "regroup"], [0], tmp_path, train=train) == []
    assert train.runs == [("local", 0), ("regroup", 0)]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert capsys.readouterr() == ("", "")


def test_ranks_of_torchrun_all_ask_the_trainer(
    tmp_path: Path, as_rank: Callable[[int], None]
) -> None:
    """Where only the first rank sees the folder, one that skipped a run would leave the others."""
    compare(CONFIG, ["local"], [0], tmp_path, train=Trainer())
    as_rank(0)
    train = Trainer()
    compare(CONFIG, ["local"], [0], tmp_path, train=train)
    assert train.runs == [("local", 0)]


def test_a_signal_between_two_runs_is_heard(tmp_path: Path) -> None:
    """Under torchrun it is noted for the trainer, which isn't there at that moment."""
    rank = Rank(0, 2, torch.device("cpu"))

    def change(record: Record) -> Record:
        rank.stop.signum = 15
        return record

    plan = module.planned(CONFIG, ["local", "regroup"], [0], tmp_path)
    train = Trainer(change)
    with pytest.raises(Stopped, match="compare: stopped after run 1 of 2") as caught:
        module.run_all(rank, plan, tmp_path, train)
    assert caught.value.signum == 15
    assert train.runs == results(tmp_path) == [("local", 0)]


@pytest.mark.parametrize(
    ("bns", "seeds", "config", "message"),
    [
        ([], [0], CONFIG, "--bn must name at least one, got none"),
        (["local"], [], CONFIG, "--seeds must name at least one, got none"),
        (["local", "local"], [0], CONFIG, "--bn names local twice"),
        (["local"], [0, 1, 0], CONFIG, "--seeds names 0 twice"),
        (["local", "group"], [0], CONFIG, "--bn must be of local, sync, .*, got group"),
        (["local", "swap"], [0], ROUND, "--bn swap would do nothing"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    tmp_path: Path, bns: list[Any], seeds: list[int], config: Config, message: str
) -> None:
    train = Trainer()
    with pytest.raises(ConfigError, match=message):
        compare(config, bns, seeds, tmp_path, train=train)
    assert train.asked == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "a list, not an object"),
        ('{"complete": true}', "has no 'bn'"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs" / "local-seed0" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises((CheckpointError, ResultsError), match=message) as caught:
        compare(CONFIG, ["local"], [0], tmp_path, train=Trainer())
    assert str(path) in str(caught.value)
