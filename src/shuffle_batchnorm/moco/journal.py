"""What a run writes for people: its configuration, two tables, TensorBoard, a line or a bar.

``log.csv`` has a row per epoch, ``steps.csv`` one per ``--log-every`` steps, ``config.json`` how it
was started. A run that goes on finds the tables as they were at the checkpoint, whatever was
written after it.
"""

import csv
import importlib.metadata
import io
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, read_object, write_atomically, write_json
from .config import CALL, Config, to_dict

Row = Mapping[str, Any]
_SCORES, _RATES = ("loss", "pretext_accuracy"), ("lr", "samples_per_second")
EPOCH_COLUMNS = ("epoch", "step", *_SCORES, "knn", *_RATES, "seconds")
STEP_COLUMNS = ("step", "epoch", *_SCORES, *_RATES)
CONFIG, RECORD, LOG, STEPS = "config.json", "record.json", "log.csv", "steps.csv"


class Table:
    """A CSV file that grows row by row; every row is handed to the system at once.

    Args:
        path: the file, which is written anew.
        columns: its header.
        rows: what it begins with.
    """

    def __init__(self, path: Path, columns: Sequence[str], rows: Sequence[Row] = ()) -> None:
        self.path, self.columns = path, columns
        write_atomically(path, self._lines([dict(zip(columns, columns, strict=True)), *rows]))

    def append(self, row: Row) -> None:
        """Add a row.

        Raises:
            CheckpointError: the disk is full, say.
        """
        try:
            with self.path.open("ab") as file:
                file.write(self._lines([row]))
        except OSError as error:
            raise CheckpointError(f"{CALL}: can't write {self.path}: {error.strerror}") from error

    def _lines(self, rows: Sequence[Row]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writerows(rows)
        return text.getvalue().encode()


class Journal:
    """The log of one run; only rank 0 has one.

    Args:
        config: of the run, with its folder.
        world_size: W.
        steps: of the whole run.
        step: how many are done.
        curve: the epochs that are done.
    """

    def __init__(
        self, config: Config, world_size: int, steps: int, step: int, curve: Sequence[Row]
    ) -> None:
        self.folder = config.run.output
        self.steps, self.epochs = steps, config.optim.epochs
        earlier = _read_steps(self.folder / STEPS, step)
        self._steps = Table(self.folder / STEPS, STEP_COLUMNS, earlier)
        self._epochs = Table(self.folder / LOG, EPOCH_COLUMNS, curve)
        self._board = _tensorboard(self.folder, step) if config.run.tensorboard else None
        # Not at the top: the benchmarks want `processor` without the extra `train`.
        from tqdm import tqdm

        # Its own lock is one between processes, which a rank that is stopped would leave behind.
        tqdm.set_lock(threading.RLock())
        # `disable=None` draws it on a terminal only.
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
        write_json(self.folder / CONFIG, _describe(config, world_size, self.folder / CONFIG))

    def on_step(self) -> None:
        """Count a step."""
        self._bar.update()

    def on_window(self, row: Row) -> None:
        """Log the steps since the last row; `row` has `STEP_COLUMNS`."""
        self._steps.append(row)
        if self._board is not None:
            for name in (*_SCORES, *_RATES):
                self._board.add_scalar(f"train/{name}", row[name], row["step"])
        self._bar.set_postfix_str(_figures(row), refresh=False)

    def on_epoch(self, row: Row) -> None:
        """Log an epoch; `row` has `EPOCH_COLUMNS`, with None for a kNN that was not due."""
        self._epochs.append(row)
        if self._board is not None and row["knn"] is not None:
            self._board.add_scalar("test/knn", row["knn"], row["step"])
        if not self._bar.disable:
            self._bar.set_description_str(f"epoch {row['epoch']}/{self.epochs}", refresh=False)
            return
        left = timedelta(seconds=round((self.steps - row["step"]) * row["seconds"] / row["step"]))
        which = f"[{row['epoch']:>{len(str(self.epochs))}}/{self.epochs}]"
        self.say(f"{which} {_figures(row)}, {left} left")

    def say(self, text: str) -> None:
        """Print a line, past the bar."""
        self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Close the bar and the files."""
        self._bar.close()
        if self._board is not None:
            self._board.close()


def warn(call: str, text: str) -> None:
    """Print a warning in one line; one rank alone should."""
    print(f"{call}: warning: {text}", file=sys.stderr, flush=True)


def score(name: str, value: float | None) -> str:
    """Return a score in words; None was left out."""
    return f"{name} left out" if value is None else f"{name} {value:.4f}"


def outcome(record: Mapping[str, Any]) -> str:
    """Return what the record of a run that is at its end says, in words."""
    if record["leak"] is None:
        return f"{score('kNN', record['knn'])}, it has diverged"
    low, high = record["leak_interval"]
    leak = f"leak {record['leak']:.3f} (95 % interval {low:.3f} to {high:.3f})"
    return f"{score('kNN', record['knn'])}, {leak}"


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("shuffle_batchnorm", "kornia", "numpy", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the git commit of the library's source, with a plus if it was changed since.

    None where it is not in a repository of its own: installed, say, in a folder of another one.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        own = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(own, capture_output=True, timeout=10, check=True)
        where = [*git, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        done = subprocess.run(where, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _describe(config: Config, world_size: int, path: Path) -> dict[str, Any]:
    """Return what `config.json` holds; a run that goes on adds to the list of its starts."""
    start = {
        "command": shlex.join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "processor": processor(),
        "cpus": os.cpu_count(),
    }
    starts = []
    if config.run.resume and path.exists():
        starts = read_object(path, {"starts": list})["starts"]
    return {"config": to_dict(config), "world_size": world_size, "starts": [*starts, start]}


def _read_steps(path: Path, step: int) -> list[Row]:
    """Return the rows of the steps that are done; a row cut short by a crash is after them."""
    if step == 0 or not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if None not in r and None not in r.values()]
        return [row for row in rows if int(row["step"]) <= step]
    except (KeyError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{CALL}: {path} is damaged; remove it: its rows are lost") from error


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What was written after the checkpoint is hidden.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _figures(row: Row) -> str:
    knn = f", kNN {row['knn']:.3f}" if row.get("knn") is not None else ""
    return (
        f"loss {row['loss']:.3f}, pretext {row['pretext_accuracy']:.3f}{knn}, "
        f"{row['samples_per_second']:.0f} samples/s"
    )
