"""Small runs of the trainer for its tests: as a command that can be killed, or in this process."""

import functools
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shuffle_batchnorm.moco import trainer
from shuffle_batchnorm.moco.config import (
    Config,
    DataConfig,
    MoCoConfig,
    NormConfig,
    OptimConfig,
    RunConfig,
)
from shuffle_batchnorm.moco.measure import Measurements
from shuffle_batchnorm.moco.trainer import Record

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "shuffle_batchnorm")
# 11 steps an epoch. With 32 groups the leak, which takes most of the time, is measured in one pass.
FLAGS = "train --image-size 8 --groups 16 --batch-size 128 --queue 256 --epochs 2 --log-every 3"
FLAGS += " --eval-every 1 --no-tensorboard --device cpu"
# What depends on the clock.
TIMED = {"seconds", "samples_per_second"}


def small_config(output: Path, **changes: Any) -> Config:
    """The configuration that FLAGS stand for on one rank, with other values for some of them."""
    config = Config(
        data=DataConfig(image_size=8),
        norm=NormConfig(groups=16),
        moco=MoCoConfig(queue=256),
        optim=OptimConfig(epochs=2, batch_size=128),
        run=RunConfig(
            output=output, log_every=3, eval_every=1, tensorboard=False, device="cpu", ranks=1
        ),
    )
    for name, value in changes.items():
        parts = ("data", "network", "norm", "moco", "optim", "run")
        [part] = [part for part in parts if hasattr(getattr(config, part), name)]
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config


def train_quickly(config: Config) -> Record:
    """Train, but measure the leak with few keys at the end."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "measure_leak: 2 batches are too few")
        few = functools.partialmethod(Measurements.leak, batches=2, keys=4)
        patch.setattr(Measurements, "leak", few)
        return trainer.train(config)


def environment() -> dict[str, str]:
    """The variables of a process on the CPU, without those of a torchrun around pytest."""
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return ours | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; nothing of it outlives the block."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env=environment(), text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        yield process
    finally:
        kill_session(process.pid)
        process.communicate()


def kill_session(session: int) -> None:
    """End every process that a started one has left."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


def run(*command: str, code: int = 0) -> tuple[str, str]:
    """The stdout and stderr of a command that has to end with an exit code."""
    with started(*command) as process:
        stdout, stderr = process.communicate(timeout=150)
        assert process.returncode == code, stdout + stderr
    return stdout, stderr


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait, with pauses too short for a file to come and go in them, and long enough to work."""
    until = time.monotonic() + 120
    while not condition():
        time.sleep(0.0005)
        assert process.poll() is None, "".join(process.communicate())
        assert time.monotonic() < until, "it took too long"


def rows(path: Path) -> list[str]:
    """The lines of a CSV file that are whole, below its header."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()[1:]


def without_times(value: Any) -> Any:
    """Nested dicts and lists without what depends on the clock or on where the run was written."""
    if isinstance(value, dict):
        names = TIMED | {"marks", "config"}
        return {k: without_times(v) for k, v in value.items() if k not in names}
    if isinstance(value, (list, tuple)):
        return [without_times(v) for v in value]
    return value


def timeless_rows(path: Path) -> list[list[str]]:
    """The cells of a CSV file, without the columns that depend on the clock."""
    header, *lines = (line.split(",") for line in path.read_text().splitlines())
    columns = [column for column, name in enumerate(header) if name not in TIMED]
    return [[line[column] for column in columns] for line in [header, *lines]]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested values differ, tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for k, (x, y) in pairs for d in differences(x, y, f"{where}/{k}")]
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [where]
