"""The training loop: a run that is killed and goes on, on one rank or several, is the same run."""

import functools
import json
import math
import os
import random
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moco.moco_runs import (
    COMMAND,
    FLAGS,
    differences,
    rows,
    small_config,
    started,
    timeless_rows,
    train_quickly,
    wait_until,
    without_times,
)
from ranks import run_on_ranks
from shuffle_batchnorm.moco import checkpoint
from shuffle_batchnorm.moco.checkpoint import CheckpointError
from shuffle_batchnorm.moco.comparison.summary import check_records, summarise
from shuffle_batchnorm.moco.config import Config, ConfigError, OptimConfig
from shuffle_batchnorm.moco.data.loading import EpochBatches
from shuffle_batchnorm.moco.measure_checkpoint import evaluate_checkpoint, probe_checkpoint
from shuffle_batchnorm.moco.networks import NetworkError
from shuffle_batchnorm.moco.ranks.launch import Rank
from shuffle_batchnorm.moco.ranks.spawn import Stopped
from shuffle_batchnorm.moco.schedule import learning_rate
from shuffle_batchnorm.moco.trainer import Progress, Record, Trainer


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("last.pt", "best.pt"):
        one, other = (without_times(checkpoint.load(folder / name)) for folder in (a, b))
        assert differences(one, other) == []
    for name in ("log.csv", "steps.csv"):
        assert timeless_rows(a / name) == timeless_rows(b / name)
    one, other = (json.loads((folder / "record.json").read_text()) for folder in (a, b))
    assert differences(without_times(one), without_times(other)) == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_on_ranks(2, train_quickly, small_config(folder))
    return folder


def test_interrupted_run_ends_bit_identical(uninterrupted: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGKILL while a checkpoint is written, each after some more steps.

    Forgets: a random state, the queue's pointer, a rank's running statistics, SGD's momentum, a row
    of a table; or leaves a checkpoint that can't be read.
    """
    command = [*COMMAND, *FLAGS.split(), "--ranks", "2", "--output", str(tmp_path), "--resume"]

    def logged(count: int) -> Callable[[], bool]:
        return lambda: len(rows(tmp_path / "steps.csv")) >= count

    with started(*command) as process:
        wait_until(logged(1), process)
        os.killpg(process.pid, signal.SIGINT)  # to all processes, as a terminal does
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        last = stderr.splitlines()[-1]
        assert re.fullmatch(r"train: stopped by SIGINT after step \d+ of 22.*--resume.*", last)
    with started(*command, "--save-every", "2") as process:
        wait_until(logged(len(rows(tmp_path / "steps.csv")) + 2), process)
        wait_until(lambda: any(tmp_path.glob("last.pt.*.tmp")), process)
        process.kill()
    run_on_ranks(2, train_quickly, small_config(tmp_path, resume=True, save_every=5))
    assert_same_run(uninterrupted, tmp_path)


class Crash(Exception):
    """What stands for SIGKILL inside a process."""


def crash_at(steps: Sequence[int], config: Config) -> Record:
    """Train, but drop everything when these steps begin, and go on from the checkpoint."""
    take_step = Trainer.train_step
    left = list(steps)

    def step_or_crash(trainer: Trainer, *args: Any) -> None:
        if left and trainer.step == left[0]:
            del left[0]
            raise Crash
        take_step(trainer, *args)
        torch.rand(()), random.random()  # as a network with dropout would

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_or_crash)
        while True:
            try:
                return train_quickly(config)
            except Crash:
                config = replace(config, run=replace(config.run, resume=True))


@pytest.mark.parametrize("bn", ["batch-shuffle", "eman"])
def test_crash_on_three_ranks(bn: str, tmp_path: Path) -> None:
    """At step 0, between checkpoints, at an epoch's first step; ranks' sums have an order here.

    With batch-shuffle, which has a state of its own, and eman, whose statistics are summed over the
    ranks; regroup is interrupted above.
    """
    changes = dict(bn=bn, groups=2, batch_size=96, save_every=4)
    config = small_config(tmp_path / "a", **changes)
    uninterrupted = run_on_ranks(3, crash_at, (), config)
    config = replace(config, run=replace(config.run, output=tmp_path / "b"))
    broken = run_on_ranks(3, crash_at, (0, 6, 14), config)
    assert differences(without_times(uninterrupted), without_times(broken)) == []
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_crash_without_a_rank_to_ask(tmp_path: Path) -> None:
    """One rank, without a process group, with a symmetric loss and a warm-up."""
    config = small_config(tmp_path / "a", symmetric=True, warmup_epochs=1, save_every=3)
    crash_at((), config)
    crash_at((1, 14), replace(config, run=replace(config.run, output=tmp_path / "b")))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_signal_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step during which SIGTERM comes is finished and saved; a handler is put back."""
    take_step = Trainer.train_step

    def step(trainer: Trainer, *args: Any) -> None:
        take_step(trainer, *args)
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 6 of 22") as stopped:
        train_quickly(small_config(tmp_path))
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 6


@pytest.mark.parametrize("bn", ["sync", "regroup", "eman", "simclr"])
def test_two_ranks_train_as_one(bn: str, tmp_path: Path) -> None:
    """2 ranks x 16 groups and 1 rank x 32 groups, in float64, on the same images in one order."""
    same = dict(bn=bn, augment="none", precision="float64", epochs=1, symmetric=True)
    apart = run_on_ranks(2, train_quickly, small_config(tmp_path / "2", groups=16, **same))[0]
    together = train_quickly(small_config(tmp_path / "1", groups=32, **same))
    for column in ("loss", "pretext_accuracy", "knn"):
        one, other = ([row[column] for row in r["curve"]] for r in (apart, together))
        assert one == pytest.approx(other, rel=1e-9), column
    one, other = (timeless_rows(tmp_path / n / "steps.csv")[1:] for n in "21")
    numbers = [[[float(cell) for cell in row] for row in table] for table in (one, other)]
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=1e-7, atol=1e-9)
    weights = [checkpoint.load(tmp_path / n / "last.pt")["model"] for n in "21"]
    torch.testing.assert_close(weights[0]["queue"], weights[1]["queue"], rtol=1e-7, atol=1e-9)
    assert apart["leak"] == pytest.approx(together["leak"], abs=1e-9)
    is_zero = (apart["leak"], apart["leak_interval"]) == (0.0, [0.0, 0.0])
    assert is_zero == (bn == "eman")  # whose keys depend on no other sample


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    """Running statistics that are averaged for kNN, or a random number that it draws, would."""
    often = small_config(tmp_path / "often", eval_every=1)
    rarely = small_config(tmp_path / "rarely", eval_every=2)
    run_on_ranks(2, train_quickly, often)
    run_on_ranks(2, train_quickly, rarely)
    parts = ("model", "ranks", "optimizer")
    one, other = (checkpoint.load(c.run.output / "last.pt") for c in (often, rarely))
    assert [differences(one[part], other[part]) for part in parts] == [[], [], []]
    assert [row["knn"] is None for row in one["curve"]] == [False, False]
    assert [row["knn"] is None for row in other["curve"]] == [True, False]


def test_ranks_keep_their_own_running_statistics(uninterrupted: Path) -> None:
    """A trainer that saves rank 0's for all would resume otherwise, but not here and now."""
    ranks = checkpoint.load(uninterrupted / "last.pt")["ranks"]
    name = "encoder_q.backbone.layers.1.running_mean"
    assert not torch.equal(*(rank["buffers"][name] for rank in ranks))


def test_callers_random_state_stays(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    train_quickly(small_config(tmp_path, epochs=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # of torch's own compiler
def test_compiled_agrees_with_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without what is measured at the end, for which it would be compiled again; and without
    # generated code, which the layer's own tests compile.
    monkeypatch.setattr(Trainer, "finish", lambda trainer: trainer.curve[-1])
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    same = dict(augment="none", precision="float64", epochs=1, groups=4)
    eager, compiled = (
        train_quickly(small_config(tmp_path / str(choice), compile=choice, **same))
        for choice in (False, True)
    )
    for column in ("loss", "pretext_accuracy", "knn"):
        assert eager[column] == pytest.approx(compiled[column], rel=1e-7), column


def test_variants_train(tmp_path: Path) -> None:
    plain = train_quickly(small_config(tmp_path / "plain", epochs=1))
    for changes in ({"precision": "bf16"}, {"channels_last": True}):
        variant = train_quickly(small_config(tmp_path / next(iter(changes)), epochs=1, **changes))
        assert variant["loss"] == pytest.approx(plain["loss"], rel=0.02)
        assert variant["loss"] != plain["loss"], "the flag did nothing"
        assert all(map(math.isfinite, variant["leak_interval"]))


def test_finished_run_is_not_run_again(uninterrupted: Path) -> None:
    before = (uninterrupted / "last.pt").stat().st_mtime_ns
    config = small_config(uninterrupted, resume=True, groups=16)
    [record, _] = run_on_ranks(2, train_quickly, config)
    assert record == json.loads((uninterrupted / "record.json").read_text())
    assert (uninterrupted / "last.pt").stat().st_mtime_ns == before


def test_record_has_what_the_report_wants(uninterrupted: Path) -> None:
    record = json.loads((uninterrupted / "record.json").read_text())
    names = "bn seed epochs world_size groups blocks offset leak leak_standard_error knn"
    assert set(names.split()) | {"pretext_accuracy", "loss", "seconds"} <= record.keys()
    assert {"device", "train_images", "test_images", "parameters"} <= record.keys()
    assert record["world_size"] == 2
    assert record["complete"] is True
    assert [row["epoch"] for row in record["curve"]] == [1, 2]
    assert check_records([record], "record.json")


def test_a_linear_probe_at_the_end(tmp_path: Path) -> None:
    """Asked for, it is in the record, and is what `evaluate` finds in the checkpoint."""
    record = train_quickly(small_config(tmp_path, epochs=1, linear=True))
    assert record["linear"] == evaluate_checkpoint(tmp_path / "last.pt")["linear"]


def test_a_run_that_diverged_has_a_record_without_a_linear_probe(tmp_path: Path) -> None:
    """Catches a classifier that is trained with NaN, which it refuses."""
    record = train_quickly(small_config(tmp_path, epochs=1, linear=True, lr=1e30))
    assert record["diverged"]
    assert record["linear"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "there is a run in .*: --resume prints its result, or choose another"),
        ({"resume": True, "lr": 0.1}, r"another --lr \(was 0.12, is 0.1\), number of ranks"),
        (
            {"resume": True, "bn": "local", "epochs": 3},
            r"--bn \(.*\), --epochs \(was 2, is 3\), num",
        ),
        ({"resume": True, "groups": 32}, r"another --groups \(was 16, is 32\), number"),
    ],
)
def test_begun_otherwise(uninterrupted: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        train_quickly(small_config(uninterrupted, **changes))


def test_another_number_of_ranks(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes((uninterrupted / "last.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"another number of ranks \(was 2, is 1\)"):
        train_quickly(small_config(tmp_path, resume=True))


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--batch-size 1024 is more than half of the 1438"):
        train_quickly(small_config(tmp_path, batch_size=1024, queue=1024))


def test_a_run_that_diverges_has_a_record_and_is_said_to(tmp_path: Path) -> None:
    """Catches a training that ends in an error of the probe, and can't be part of a comparison."""
    record = train_quickly(small_config(tmp_path, epochs=1, lr=1e30))
    assert record["complete"]
    assert record["diverged"]
    assert record["leak"] is None
    [summary] = summarise([record])
    assert (summary.runs, summary.diverged) == (1, 1)
    with pytest.raises(ConfigError, match="the model has diverged"):
        probe_checkpoint(tmp_path / "last.pt", batches=2, keys=4)


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    """Catches a lock, or a folder, of a configuration that was never trained."""
    with pytest.raises(NetworkError):
        train_quickly(small_config(tmp_path / "runs" / "moco", network="alexnet"))
    with pytest.raises(ConfigError):
        train_quickly(small_config(tmp_path / "runs" / "moco", batch_size=1024, queue=1024))
    assert list(tmp_path.iterdir()) == []


def test_rows_are_means_over_steps_and_ranks() -> None:
    """Catches a sum over ranks that is not divided by them, and a speed of one rank."""
    trainer: Any = object.__new__(Trainer)
    trainer.rank, trainer.step = Rank(0, 2, torch.device("cpu")), 6
    trainer.config = Config(optim=OptimConfig(batch_size=32))
    trainer.batches = EpochBatches(64, 32)
    row = trainer.figures_since(Progress(2, 10.0, 1.0, 3.0), Progress(6, 26.0, 3.0, 5.0))
    assert (row["loss"], row["pretext_accuracy"]) == (2.0, 0.25)
    assert row["samples_per_second"] == 64.0
    assert row["lr"] == learning_rate(trainer.config, 5, 2)
