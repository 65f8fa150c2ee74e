"""Checkpoints that a crash can't spoil: written aside, then renamed in one step.

A folder holds ``last.pt``, the one before it as ``last.previous.pt``, and ``best.pt``. Each is what
``torch.save`` writes, of tensors and plain values only.
"""

import fcntl
import io
import json
import os
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .config import CALL, Config, UserError, flag, flat

LAST, PREVIOUS, BEST = "last.pt", "last.previous.pt", "best.pt"
DAMAGED = "last.damaged.pt"  # what a run that goes on from `PREVIOUS` has found as `LAST`
FORMAT = 1
# Without these it is no checkpoint; see `Trainer.save` for all that is in it.
PARTS = {"format", "config", "world_size", "step", "model", "optimizer", "ranks"}
# Flags that may change when a run goes on: they say where and how it runs, not what is trained.
# The number of ranks counts as it is, not as the flag says: torchrun ignores the flag.
_WHERE = {"data_path", "output", "ranks", "device"}
_HOW = {"workers", "resume", "save_every", "log_every", "linear", "tensorboard"}
FREE = frozenset(_WHERE | _HOW)
_ZIP = b"PK\x03\x04"  # what a zip file begins with

State = dict[str, Any]


class CheckpointError(UserError):
    """A file of a run can't be written, or can't be gone on from."""


class HeldError(CheckpointError):
    """Another process writes to the folder."""


class DamagedError(CheckpointError):
    """A file is no checkpoint, or is one no more."""


def save(path: Path, state: State) -> None:
    """Write a checkpoint; the existing one stays whole until the new one is on the disk.

    Args:
        path: ``last.pt`` or ``best.pt`` in the run's folder; what was ``last.pt`` becomes
            ``last.previous.pt``.
        state: with `PARTS`, of tensors and plain values.

    Raises:
        CheckpointError: the disk is full, say; nothing has changed then.
    """
    # In memory first: what torch's writer makes of a full disk is not an OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    keep = path.with_name(PREVIOUS) if path.name == LAST else None
    write_atomically(path, buffer.getvalue(), keep)


def write_atomically(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Replace a file by one with other content, which can't be seen half written.

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
            path.replace(keep)  # until the next line there is no `path`: `find` knows
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        was = f"; the {path.name} before it is untouched" if path.exists() else ""
        raise CheckpointError(f"{CALL}: can't write {path}: {error.strerror}{was}") from error


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, in one step.

    Raises:
        CheckpointError: the disk is full, say; the old file is as it was.
    """
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return what `write_json` has written.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{CALL}: can't read {path}: {error.strerror}") from error
    except ValueError as error:  # what is not UTF-8, and what is not JSON
        raise CheckpointError(f"{CALL}: {path} is not JSON: {error}") from error


def read_object(path: Path, kinds: dict[str, type]) -> State:
    """Return what a file of a run holds.

    Args:
        path: of the file.
        kinds: by name, what it must have.

    Raises:
        CheckpointError: it can't be read, or is something else.
    """
    value = read_json(path)
    if not isinstance(value, dict) or any(
        name not in value or not isinstance(value[name], kind) for name, kind in kinds.items()
    ):
        raise CheckpointError(f"{CALL}: {path} is damaged, or not of this trainer; remove it")
    return value


def find(folder: Path) -> list[Path]:
    """Return the checkpoints to go on from, the latest first."""
    return [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]


def load_latest(paths: Sequence[Path]) -> tuple[Path, State, list[DamagedError]]:
    """Load the first checkpoint that is whole.

    Args:
        paths: at least one; see `find`.

    Returns:
        Its path, what is in it, and what is wrong with those before it.

    Raises:
        CheckpointError: none of them can be gone on from.
    """
    errors: list[DamagedError] = []
    for path in paths:
        try:
            return path, load(path), errors
        except DamagedError as error:
            errors.append(error)
    best = paths[0].with_name(BEST)
    advice = f"rename {BEST} to {LAST} to go on from it" if best.exists() else "begin anew"
    files = "this file" if len(errors) == 1 else "these files"
    raise CheckpointError(f"{'; '.join(map(str, errors))}: remove {files}, and {advice}")


def load(path: Path) -> State:
    """Return what `save` has written.

    Raises:
        DamagedError: it is no checkpoint, or is damaged.
        CheckpointError: there is no such file, it can't be read, or has another format.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
        # torch doesn't check the checksums of its own files.
        with zipfile.ZipFile(path) as archive:
            is_whole = archive.testzip() is None
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(
            f"checkpoint: {path} is a folder; name a file in it, as last.pt"
        ) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint: can't read {path}: {error.strerror}") from error
    except Exception:  # a wrong byte can mean anything to a parser
        is_whole = False
    # A crash may leave a file empty.
    if not is_whole and _ZIP.startswith(start):
        raise DamagedError(f"checkpoint: {path} is damaged")
    state = None
    if is_whole:
        # A model as a whole, say, or no file of torch's, which may warn of what it takes it for.
        with warnings.catch_warnings(action="ignore"), suppress(Exception):
            state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise DamagedError(f"checkpoint: {path} is not a checkpoint of this trainer")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint: {path} has format {state['format']}, this version reads {FORMAT}"
        )
    return state


def refuse_changes(
    call: str, path: Path, before: State, now: State, free: frozenset[str] = FREE
) -> None:
    """Refuse to go on with another configuration than a run, or a comparison, was begun with.

    Args:
        call: for the message.
        path: the file that says how it was begun, for the message.
        before: what is in it: ``config``, as `config.to_dict` made it, ``world_size``, ``device``.
        now: the same to go on with; what `before` lacks is not compared.
        free: flags that may differ.

    Raises:
        CheckpointError: names all flags that differ, the number of ranks and the device.
    """
    if not isinstance(before, dict) or not before.keys() >= {"config", "world_size"}:
        raise CheckpointError(
            f"{call}: {path} does not say what was begun; choose another --output"
        )
    old, new = (
        {name: value for part in side["config"].values() for name, value in part.items()}
        for side in (before, now)
    )
    young = {n: v for n, v in flat(Config()).items() if n in new}  # flags the run did not have
    pairs = [(flag(n), (young | old).get(n), new.get(n)) for n in {**new, **old} if n not in free]
    for name, words in (("world_size", "number of ranks"), ("device", "device")):
        if name in before and name in now:
            pairs.append((words, before[name], now[name]))
    changes = [f"{name} (was {was}, is {value})" for name, was, value in pairs if was != value]
    if changes:
        raise CheckpointError(
            f"{call}: {path} was begun with another {', '.join(changes)}; choose another --output"
        )


def to_cpu(value: Any) -> Any:
    """Return a copy of nested dicts, lists and tuples with their tensors on the CPU."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), value)


@contextmanager
def folder_lock(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Keep other runs out of a folder inside a block; made for it, the folder goes if left empty.

    A rank that was killed may take a moment to release it.

    Raises:
        HeldError: another run is in it.
        CheckpointError: it can't be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / ".lock"
    until = time.monotonic() + patience
    try:
        while not (file := _locked(lock)):
            if time.monotonic() > until:
                message = f"{CALL}: another run is writing to {folder}; choose another --output"
                raise HeldError(message)
            time.sleep(0.1)
    except OSError as error:
        raise CheckpointError(f"{CALL}: can't write to {folder}: {error.strerror}") from error
    with file:
        for left in folder.glob("*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()


def _locked(lock: Path) -> IO[str] | None:
    """Return the open lock, in a folder made if missing; None while another process has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = lock.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    try:
        is_there = os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        is_there = False
    if not is_there:  # who had it has removed it meanwhile: it keeps nobody out
        file.close()
        return None
    return file
