"""Where ranks come from: the same run under torchrun, on one node and on two."""

import json
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moco.moco_runs import FLAGS, differences, small_config, started, without_times
from ranks import run_on_ranks
from shuffle_batchnorm.moco.config import ConfigError
from shuffle_batchnorm.moco.ranks.launch import Rank, find_device, launch, world_size
from shuffle_batchnorm.moco.trainer import train

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
SHORT = [*FLAGS.replace("--epochs 2", "--epochs 1").split()]


@pytest.fixture(scope="module")
def in_one_group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The record of the run, by ranks that were in a process group already."""
    config = small_config(tmp_path_factory.mktemp("group"), epochs=1)
    return without_times(run_on_ranks(2, train, config)[0])


def finish(*commands: tuple[str, ...]) -> list[tuple[int, str]]:
    """Exit code and stderr of commands that run at the same time."""
    with ExitStack() as stack:
        processes = [stack.enter_context(started(*command)) for command in commands]
        return [(p.communicate(timeout=120)[1], p.returncode)[::-1] for p in processes]


def read(folder: Path) -> Any:
    return without_times(json.loads((folder / "record.json").read_text()))


def test_torchrun_agrees(in_one_group: Any, tmp_path: Path) -> None:
    start = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "shuffle_batchnorm")
    [(code, stderr)] = finish((*start, *SHORT, "--output", str(tmp_path)))
    assert code == 0, stderr
    assert differences(read(tmp_path), in_one_group) == []


def test_torchrun_on_two_nodes_agrees(in_one_group: Any, tmp_path: Path) -> None:
    for last_try in (False, True):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        where = ("--nnodes", "2", "--nproc-per-node", "1", "--master-port", port)
        here = ("--master-addr", "127.0.0.1")
        what = ("-m", "shuffle_batchnorm", *SHORT, "--output", str(tmp_path))
        ends = finish(*((*TORCHRUN, *where, *here, "--node-rank", node, *what) for node in "01"))
        # Somebody else may have taken the port since the probe.
        if last_try or "address already in use" not in "".join(e for _, e in ends).lower():
            break
    assert [code for code, _ in ends] == [0, 0], ends
    assert differences(read(tmp_path), in_one_group) == []


def test_one_rank_has_no_process_group() -> None:
    rank: Rank = launch(lambda rank: rank, ranks=1, device="cpu")
    assert (rank.index, rank.world_size, rank.control) == (0, 1, None)
    assert not dist.is_initialized()


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
