"""What a run writes for people: its configuration, two tables, TensorBoard, its progress.

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
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shuffle_batchnorm.probe.progress import SILENT, Bar, Console, write_line
from shuffle_batchnorm.probe.verdict import judge

from .board import open_board
from .checkpoint import CheckpointError, read_object, write_atomically, write_json
from .config import CALL, Config, to_dict
from .data.images import Images

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
        console: where its progress is shown.
    """

    def __init__(
        self,
        config: Config,
        world_size: int,
        steps: int,
        step: int,
        curve: Sequence[Row],
        console: Console = SILENT,
    ) -> None:
        self.folder, self.epochs = config.run.output, config.optim.epochs
        earlier = _read_steps(self.folder / STEPS, step)
        self._steps = Table(self.folder / STEPS, STEP_COLUMNS, earlier)
        self._epochs = Table(self.folder / LOG, EPOCH_COLUMNS, curve)
        self._board = open_board(config, world_size, step) if config.run.tensorboard else None
        self._bar = Bar(console, "step", steps, step)
        self._knn = next((row["knn"] for row in reversed(curve) if row["knn"] is not None), None)
        write_json(self.folder / CONFIG, _describe(config, world_size, self.folder / CONFIG))

    def on_step(self) -> None:
        """Count a step."""
        self._bar.advance()

    def on_window(self, row: Row) -> None:
        """Log the steps since the last row; `row` has `STEP_COLUMNS`."""
        self._steps.append(row)
        if self._board is not None:
            for name in (*_SCORES, *_RATES):
                self._board.add(f"train/{name}", row[name], row["step"])
        self._set_figures(row)

    def on_epoch(self, row: Row) -> None:
        """Log an epoch; `row` has `EPOCH_COLUMNS`, with None for a kNN that was not due."""
        self._epochs.append(row)
        if row["knn"] is not None:
            self._knn = row["knn"]
            if self._board is not None:
                self._board.add("test/knn", row["knn"], row["step"])
        self._set_figures(row)
        self.show()

    def show(self) -> None:
        """Draw the bar again, where something else has taken its place."""
        self._bar.show()

    def on_end(self, record: Row, step: int) -> None:
        """Log what the trained model was measured to have; `record` is that of the run."""
        if self._board is not None:
            self._board.end(record, step)

    def _set_figures(self, row: Row) -> None:
        knn = "" if self._knn is None else f", kNN {self._knn:.3f}"
        self._bar.text = (
            f"loss {row['loss']:.3f}, pretext {row['pretext_accuracy']:.3f}{knn}, "
            f"epoch {row['epoch']} of {self.epochs}, {row['samples_per_second']:.0f} samples/s"
        )

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            self._board.close()


def warn(call: str, text: str) -> None:
    """Print a warning in one line; one rank alone should."""
    write_line(f"{call}: warning: {text}")


def score(name: str, value: float | None) -> str:
    """Return a score in words; None was left out."""
    return f"{name} left out" if value is None else f"{name} {value:.4f}"


def outcome(record: Mapping[str, Any]) -> str:
    """Return what the record of a run that is at its end says, in words."""
    scores = score("kNN", record["knn"])
    if "linear" in record:
        scores += f", {score('linear probe', record['linear'])}"
    if record["leak"] is None:
        return f"{scores}, it has diverged"
    return f"{scores}, {leak_in_words(record)}"


def leak_in_words(figures: Mapping[str, Any]) -> str:
    """Return a leak, its two terms, and what they say, from the figures of `leak_figures`."""
    low, high = figures["leak_interval"]
    trained, fresh = figures["leak_as_trained"], figures["leak_fresh"]
    said = figures.get("leak_verdict") or judge((low, high), as_trained=trained, fresh=fresh)
    return (
        f"leak {figures['leak']:.4f} (95 % interval {low:.4f} to {high:.4f}): top-1 "
        f"{trained:.4f} as trained, {fresh:.4f} in a fresh batch; {said}"
    )


def setting(config: Config, images: Images, world_size: int, device: torch.device) -> str:
    """Return what runs where."""
    norm, data = config.norm, config.data
    each = config.optim.batch_size // (world_size * norm.groups)
    count, side = len(images.train), data.side  # type: ignore[arg-type]
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    return (
        f"{config.network.network} network, --bn {norm.bn}, {count} images of {data.dataset} at "
        f"{side} x {side}; {ranks} on {device.type}, "
        f"{'each ' if world_size > 1 else ''}with {norm.groups} group"
        f"{'s' if norm.groups > 1 else ''} of {each}"
    )


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
