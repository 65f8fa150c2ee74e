"""Where ranks come from, and which devices they get; two nodes of torchrun are in test_main."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moco.moco_runs import FLAGS, differences, run, small_config, without_times
from ranks import run_on_ranks
from shuffle_batchnorm.moco.config import ConfigError
from shuffle_batchnorm.moco.ranks.launch import Rank, find_device, launch, world_size
from shuffle_batchnorm.moco.ranks.spawn import Stopped
from shuffle_batchnorm.moco.trainer import train

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
SHORT = FLAGS.removeprefix("train ").replace("--epochs 2", "--epochs 1").split()


def test_a_comparison_under_torchrun_agrees(tmp_path: Path) -> None:
    """With ranks that were in a process group already, bit for bit; and two runs need one group.

    Catches a process group per run, which meets where the one before it met, and nobody is left.
    """
    config = small_config(tmp_path / "group", epochs=1)
    [expected, _] = run_on_ranks(2, train, config)
    start = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "shuffle_batchnorm")
    output = tmp_path / "compared"
    what = ("compare", *SHORT, "--bn", "regroup,local", "--output", str(output))
    stdout, stderr = run(*start, *what)
    record = json.loads((output / "runs" / "regroup-seed0" / "record.json").read_text())
    assert differences(without_times(record), without_times(expected)) == []
    results = json.loads((output / "results.json").read_text())
    assert [(one["bn"], one["world_size"]) for one in results] == [("regroup", 2), ("local", 2)]
    for said in ("[1/2] regroup, seed 0: leak ", "train: from the beginning of 11 steps, to "):
        assert stderr.count(said) == 1 + ("train" in said)  # one rank speaks, of two runs
    assert "train:" not in stdout
    assert stdout.count("| `regroup` |") == stdout.count("\nregroup: ") == 1
    assert (output / "report.html").exists()


def test_one_rank_has_no_process_group() -> None:
    rank: Rank = launch(lambda rank: rank, ranks=1, device="cpu")
    assert (rank.index, rank.world_size, rank.control) == (0, 1, None)
    assert not dist.is_initialized()


def test_one_rank_heeds_a_late_signal() -> None:
    """Catches a comparison that goes on with its next run; without a signal there is a result."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM, which came when the run was at its end"):
        launch(lambda _: signal.raise_signal(signal.SIGTERM), ranks=1, device="cpu", graceful=True)
    assert signal.getsignal(signal.SIGTERM) is before
    assert launch(lambda _: 7, ranks=1, device="cpu", graceful=True) == 7


def test_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_size(3, "auto") == 3
    assert world_size(None, "cpu") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert world_size(None, "auto") == 4
    assert world_size(None, "cpu") == 1
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "6")):
        monkeypatch.setenv(name, value)
    assert world_size(3, "auto") == 6


def test_a_gpu_each_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto", 1, 2) == torch.device("cuda", 1)
    assert find_device("auto", 0, 1, [1]) == torch.device("cuda", 1)
    assert find_device("auto", 0, 2, [1, 2]) == torch.device("cpu")
    assert find_device("auto", 1, 3) == torch.device("cpu")
    assert find_device("cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda: 3 ranks here, but 2 GPUs; each needs"):
        find_device("cuda", 0, 3)
