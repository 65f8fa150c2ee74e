"""Processes that start and end together. Each test starts its own: that is what it is about.

That they end when their parent is killed is in test_main.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shuffle_batchnorm.moco.config import ConfigError
from shuffle_batchnorm.moco.ranks.spawn import (
    RankError,
    Stopped,
    StopRequest,
    noting_signals,
    spawn_ranks,
)


class Witness:
    """Tells when Python is taken down, and this object with it."""

    def __init__(self, path: str) -> None:
        self.note = functools.partial(os.mkdir, path)

    def __del__(self) -> None:
        self.note()


def be_witnessed(_rank: int, _stop: StopRequest, folder: str) -> None:
    print("worked")
    atexit.register(os.mkdir, f"{folder}/exit")
    vars(sys)["witness"] = Witness(f"{folder}/shutdown")


def fail(rank: int, _stop: StopRequest) -> None:
    if rank == 1:
        raise ConfigError("train: --this is wrong on rank 1")
    time.sleep(600)


def die(rank: int, _stop: StopRequest, folder: str) -> None:
    if rank == 1:
        Path(folder, "dies").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not Path(folder, "dies").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    raise RuntimeError("lost a peer")  # as gloo does then


def wait_for_stop(rank: int, stop: StopRequest, folder: str) -> None:
    Path(folder, f"{os.getpid()}.pid").touch()
    while not stop.signum:
        time.sleep(0.01)
    raise Stopped(stop.signum, f"train: stopped by SIGTERM on rank {rank}")


def end_with_stop(_rank: int, stop: StopRequest, folder: str) -> int:
    """Come to the end as if no signal had come: one that came during the last measurement."""
    with contextlib.suppress(Stopped):
        wait_for_stop(0, stop, folder)
    return 1


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


def when_all_run(folder: Path, count: int, do: Callable[[], None]) -> threading.Thread:
    """Do something in a thread once so many ranks run."""

    def wait_and_do() -> None:
        until = time.monotonic() + 60
        while len(alive(folder)) < count and time.monotonic() < until:
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait_and_do)
    thread.start()
    return thread


def test_one_error_ends_all() -> None:
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="--this is wrong on rank 1") as error:
        spawn_ranks(fail, 2)
    assert time.monotonic() - begun < 60
    assert "on rank 1:\nTraceback" in error.value.__notes__[0]


def test_death_is_told_from_its_echo(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="process of rank 1 died: killed by SIGKILL"):
        spawn_ranks(die, 2, str(tmp_path))


def fail_with_workers(rank: int, _stop: StopRequest) -> None:
    """Raise where semaphores are left behind, as a loader's workers leave them."""
    vars(sys)["kept"] = multiprocessing.get_context("spawn").Queue()
    fail(rank, _stop)


def test_an_error_of_ranks_with_workers_is_all_that_is_printed() -> None:
    """Catches multiprocessing's warning of leaked semaphores, three lines below the error's."""
    program = (
        "if __name__ == '__main__':\n"
        "    from moco.ranks.test_spawn import fail_with_workers\n"
        "    from shuffle_batchnorm.moco.ranks.spawn import spawn_ranks\n"
        "    try:\n        spawn_ranks(fail_with_workers, 2)\n"
        "    except ValueError as error:\n        raise SystemExit(str(error))\n"
    )
    command = [sys.executable, "-c", program]
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "train: --this is wrong on rank 1\n")


def test_signal_reaches_the_ranks(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = when_all_run(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="train: stopped by SIGINT on rank") as stopped:
        spawn_ranks(wait_for_stop, 2, str(tmp_path), graceful=True)
    assert stopped.value.signum == signal.SIGINT
    thread.join()
    assert alive(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_that_no_rank_heeds(tmp_path: Path) -> None:
    """Catches a comparison that goes on with its next run."""
    thread = when_all_run(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM, which came when the run was at its end") as stopped:
        spawn_ranks(end_with_stop, 2, str(tmp_path), graceful=True)
    assert stopped.value.signum == signal.SIGTERM
    thread.join()


def started_here() -> int:
    """How many processes multiprocessing has started from this one, without asking it."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            is_ours = int(parent) == os.getpid()
            count += is_ours and b"spawn_main" in (path / "cmdline").read_bytes()
    return count


def test_signal_reaches_ranks_that_still_start(tmp_path: Path) -> None:
    """Catches a rank that a signal ends, or passes by, while it imports torch."""

    before = started_here()

    def signal_early() -> None:
        while started_here() < before + 2:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=signal_early)
    thread.start()
    with pytest.raises(Stopped, match="train: stopped by SIGINT on rank"):
        spawn_ranks(wait_for_stop, 2, str(tmp_path), graceful=True)
    thread.join()
    assert alive(tmp_path) == []


def test_second_signal_means_it(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        assert alive(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = when_all_run(tmp_path, 1, twice)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        spawn_ranks(ignore_stop, 1, str(tmp_path), graceful=True)
    thread.join()
    assert alive(tmp_path) == []


def test_second_signal_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """An echo of the first within moments is none: torchrun and a terminal both send one."""
    raised: list[int] = []
    clock = [100.0]
    with noting_signals() as stop:
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


def work(rank: int, stop: StopRequest, folder: str, factor: int) -> int:
    """Rank 0 is witnessed while it leaves; so is rank 1, whose output nobody reads."""
    if rank == 1:
        read, write = os.pipe()
        os.close(read)
        sys.stdout = os.fdopen(write, "w")
    be_witnessed(rank, stop, f"{folder}/{rank}")
    return (rank + 5) * factor


def test_ranks_return_and_leave_python_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches another rank's result; a shutdown that a gloo thread may abort, also where a flush
    fails; and what should happen before it.
    """
    for name in "01":
        (tmp_path / name).mkdir()
    assert spawn_ranks(work, 2, str(tmp_path), 3) == 15
    assert capfd.readouterr().out == "worked\n"
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["exit", "exit"]


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_so_does_one_of_torchruns(under_torchrun: bool, tmp_path: Path) -> None:
    """Catches the same for the command, which elsewhere takes Python down."""
    program = (
        "import sys; from moco.ranks import test_spawn;"
        "from shuffle_batchnorm.moco import cli;"
        f"test_spawn.be_witnessed(0, None, {str(tmp_path)!r});"
        "sys.argv[1:] = ['nonsense'];"
        "cli.run()"
    )
    ours = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= ours if under_torchrun else {}
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=folder, check=False)
    assert done.returncode == 2
    assert (tmp_path / "exit").exists()
    assert (tmp_path / "shutdown").exists() != under_torchrun
