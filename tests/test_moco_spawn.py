"""Processes that start and end together. Each test starts its own: that is what it is about."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moco_runs import ROOT, started, wait_until
from shuffle_batchnorm.moco.config import ConfigError
from shuffle_batchnorm.moco.spawn import RankError, Stopped, StopRequest, listening, spawn_ranks


def multiply(rank: int, _stop: StopRequest, factor: int) -> int:
    return (rank + 5) * factor


def fail(rank: int, _stop: StopRequest) -> None:
    if rank == 1:
        raise ConfigError("train: --this is wrong on rank 1")
    time.sleep(600)


def die(rank: int, _stop: StopRequest) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    raise RuntimeError("lost a peer")  # as gloo does then


def wait_for_stop(rank: int, stop: StopRequest, folder: str) -> None:
    Path(folder, f"{os.getpid()}.pid").touch()
    while not stop.signum:
        time.sleep(0.01)
    raise Stopped(stop.signum, f"train: stopped by SIGTERM on rank {rank}")


def ignore_stop(_rank: int, _stop: StopRequest, folder: str) -> None:
    Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(600)


def alive(folder: Path) -> list[int]:
    """The ranks that are still running; one that has ended but was not waited for is not."""
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    status = [Path(f"/proc/{pid}/stat") for pid in pids]
    return [
        pid
        for pid, path in zip(pids, status, strict=True)
        if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def parent(function: str, folder: Path) -> tuple[str, ...]:
    """The command of a process that spawns two ranks; exit code 128 + signal if it was stopped."""
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "import test_moco_spawn as t\n"
        "try: t.spawn_ranks(getattr(t, sys.argv[1]), 2, sys.argv[2])\n"
        "except t.Stopped as stopped: print(stopped); sys.exit(128 + stopped.signum)\n"
    )
    return (sys.executable, "-c", code, function, str(folder), str(ROOT / "tests"))


def test_returns_what_rank_0_returned() -> None:
    assert spawn_ranks(multiply, 2, 3) == 15


def test_one_error_ends_all() -> None:
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="--this is wrong on rank 1") as error:
        spawn_ranks(fail, 2)
    assert time.monotonic() - begun < 60
    assert "on rank 1:\nTraceback" in error.value.__notes__[0]


def test_death_is_told_from_its_echo() -> None:
    with pytest.raises(RankError, match="process of rank 1 died: killed by SIGKILL"):
        spawn_ranks(die, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_the_ranks_once(tmp_path: Path, number: signal.Signals) -> None:
    with started(*parent("wait_for_stop", tmp_path)) as process:
        wait_until(lambda: len(alive(tmp_path)) == 2, process)
        os.killpg(process.pid, number)  # to all of them, as from a terminal
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number, stderr
    assert stdout.startswith(f"train: stopped by {number.name} on rank")
    assert stderr == ""
    assert alive(tmp_path) == []


def test_second_signal_means_it(tmp_path: Path) -> None:
    with started(*parent("ignore_stop", tmp_path)) as process:
        wait_until(lambda: len(alive(tmp_path)) == 2, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
    assert alive(tmp_path) == []


def test_ranks_die_with_their_parent(tmp_path: Path) -> None:
    with started(*parent("ignore_stop", tmp_path)) as process:
        wait_until(lambda: len(alive(tmp_path)) == 2, process)
        process.kill()
        process.wait()
        until = time.monotonic() + 20
        while alive(tmp_path) and time.monotonic() < until:
            time.sleep(0.05)
        assert alive(tmp_path) == []


def test_second_signal_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """An echo of the first within moments is none: torchrun and a terminal both send one."""
    raised: list[int] = []
    clock = [100.0]
    with listening() as stop:
        handler: Callable[..., Any] = signal.getsignal(signal.SIGTERM)  # type: ignore[assignment]
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        handler(signal.SIGTERM, None)
        handler(signal.SIGINT, None)
        assert (stop.signum, raised) == (signal.SIGTERM, [])
        clock[0] += 3
        handler(signal.SIGINT, None)
        assert raised == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
