"""Checkpoints that a crash can't spoil: written aside, then put in place in one step.

A folder holds ``last.pt``, the one before it as ``last.previous.pt``, and ``best.pt``. Each is what
``torch.save`` writes, of tensors and plain values only.
"""

import fcntl
import io
import os
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import CALL, flag

LAST, PREVIOUS, BEST = "last.pt", "last.previous.pt", "best.pt"
FORMAT = 1
# What a checkpoint has to have; see `trainer.py` for what is in it.
PARTS = {
    "format",
    "config",
    "versions",
    "world_size",
    "device",
    "epoch",
    "step_in_epoch",
    "step",
    "model",
    "optimizer",
    "ranks",
    "shuffle",
    "curve",
    "best_knn",
}
# Flags that may change when a run goes on: they say where and how fast, not what is trained.
# The number of ranks counts as it is, not as the flag says: torchrun doesn't look at the flag.
FREE = {"data_path", "workers", "output", "ranks", "device", "resume"} | {
    "save_every",
    "log_every",
    "tensorboard",
}

State = dict[str, Any]


class CheckpointError(RuntimeError):
    """A file of a run can't be written, or can't be gone on from; the message is one line."""


def save(path: Path, state: State) -> None:
    """Write a checkpoint; the one that was there stays whole until the new one is on the disk.

    Args:
        path: ``last.pt`` or ``best.pt`` in the run's folder; what was ``last.pt`` is kept as
            ``last.previous.pt``.
        state: `PARTS`, of tensors and plain values.

    Raises:
        CheckpointError: the disk is full, say; nothing has changed then.
    """
    # In memory first: what torch's writer makes of a full disk is not an OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    keep = path.with_name(PREVIOUS) if path.name == LAST else None
    write_atomically(path, buffer.getvalue(), keep)


def write_atomically(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Replace a file by one with other content, in one step that can't be seen half done.

    Args:
        path: the file.
        data: its new content.
        keep: where the old file goes; None lets it go.

    Raises:
        CheckpointError: it can't be written; the old file is as it was.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        was = f"; the {path.name} before it is untouched" if path.exists() else ""
        raise CheckpointError(f"{CALL}: can't write {path}: {error.strerror}{was}") from error


def _keep(path: Path, keep: Path) -> None:
    """Give a file a second name, in the place of what had it; the file is never without a name."""
    link = keep.with_name(f"{keep.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(path)
    except OSError:  # a file system without links; `find` looks for the new name as well
        path.replace(keep)
    else:
        link.replace(keep)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(folder: Path) -> Path | None:
    """Return the checkpoint to go on from; None if the folder has none yet."""
    names = (folder / LAST, folder / PREVIOUS)
    return next((path for path in names if path.exists()), None)


def load(path: Path) -> State:
    """Return what `save` has written.

    Raises:
        CheckpointError: there is no such file, it is damaged, or something else.
    """
    try:
        # torch doesn't look at the checksums of its own files.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint: can't read {path}: {error.strerror}") from error
    except Exception as error:  # a byte in the wrong place can mean anything to a parser
        raise CheckpointError(f"checkpoint: {path} is damaged; {_advice(path)}") from error
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise CheckpointError(f"checkpoint: {path} is not one of this trainer")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint: {path} has format {state['format']}, this version reads {FORMAT}"
        )
    return state


def _advice(path: Path) -> str:
    others = [n for n in (PREVIOUS, BEST) if n != path.name and path.with_name(n).exists()]
    if not others:
        return "remove it to start from the beginning"
    return f"to go on from {others[0]}, put that in its place"


def check_flags(
    path: Path, before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse to go on with another configuration than a run was begun with.

    Args:
        path: the file that says how it was begun, for the message.
        before: the configuration in it, as `config.to_dict` made it.
        now: the one to go on with.

    Raises:
        CheckpointError: names all flags that differ.
    """
    old = {name: value for part in before.values() for name, value in part.items()}
    new = {name: value for part in now.values() for name, value in part.items()}
    names = [n for n in {**new, **old} if n not in FREE and old.get(n) != new.get(n)]
    if names:
        changes = ", ".join(f"{flag(n)} (was {old.get(n)}, is {new.get(n)})" for n in names)
        raise CheckpointError(f"{CALL}: --resume: {path} was begun with another {changes}")


def check_place(path: Path, state: State, world_size: int, device: str) -> None:
    """Refuse to go on with another number of ranks, or on another kind of device.

    Raises:
        CheckpointError: says which.
    """
    for name, now in (("world_size", world_size), ("device", device)):
        if state[name] != now:
            what = {"world_size": "number of ranks", "device": "device"}[name]
            raise CheckpointError(
                f"{CALL}: --resume: {path} was begun with another {what} (was {state[name]}, "
                f"is {now})"
            )


def to_cpu(value: Any) -> Any:
    """Return a copy of nested dicts, lists and tuples with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return value


@contextmanager
def folder_lock(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Keep other runs out of a folder; a rank that was killed may take a moment to let go.

    Raises:
        CheckpointError: another run is in it, or it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise CheckpointError(f"{CALL}: can't write to {folder}: {error.strerror}") from error
    until = time.monotonic() + patience
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    message = f"{CALL}: another run is writing to {folder}; choose another --output"
                    raise CheckpointError(message) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
            else:
                break
        for left in folder.glob("*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        yield
