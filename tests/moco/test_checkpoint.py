"""Checkpoints: whole or not there, and an error that says what to do."""

import errno
import fcntl
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shuffle_batchnorm.moco import checkpoint
from shuffle_batchnorm.moco.checkpoint import (
    FREE,
    PARTS,
    CheckpointError,
    DamagedError,
    HeldError,
    State,
    folder_lock,
    load,
    load_latest,
    read_json,
    refuse_changes,
    save,
    write_json,
)


def state(value: float) -> dict[str, Any]:
    parts: dict[str, Any] = dict.fromkeys(PARTS)
    return parts | {"format": checkpoint.FORMAT, "model": {"w": torch.full((1000,), value)}}


def weight(path: Path) -> float:
    return float(load(path)["model"]["w"][0])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_keeps_the_one_before(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        save(tmp_path / "last.pt", state(value))
    save(tmp_path / "best.pt", state(4.0))
    found = {name: weight(tmp_path / name) for name in names(tmp_path)}
    assert found == {"last.pt": 3.0, "last.previous.pt": 2.0, "best.pt": 4.0}


def test_killed_between_two_renamings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "last.pt", state(1.0))
    rename = Path.replace

    def rename_once(source: Path, target: Path) -> None:
        monkeypatch.undo()
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", rename_once)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "last.pt", state(2.0))
    assert checkpoint.find(tmp_path) == [tmp_path / "last.previous.pt"]
    assert weight(tmp_path / "last.previous.pt") == 1.0
    save(tmp_path / "last.pt", state(3.0))
    assert [weight(tmp_path / n) for n in ("last.pt", "last.previous.pt")] == [3.0, 1.0]


@pytest.mark.parametrize("moment", ["write", "sync", "replace"])
def test_full_disk_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "last.pt"
    save(path, state(1.0))
    save(path, state(2.0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if moment == "write":  # the system really stops in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    elif moment == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    try:
        with pytest.raises(CheckpointError) as refusal:
            save(path, state(3.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    reason = "File too large" if moment == "write" else "No space left on device"
    expected = f"train: can't write {path}: {reason}; the last.pt before it is untouched"
    assert str(refusal.value) == expected
    assert names(tmp_path) == {"last.pt", "last.previous.pt"}
    assert [weight(tmp_path / n) for n in ("last.pt", "last.previous.pt")] == [2.0, 1.0]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    at = data.index(torch.full((4,), 2.0).numpy().tobytes())
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = [cut, flip, lambda _: b"", lambda data: data[:2], lambda data: data[:-1]]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """And the one before it is taken, with a word of it."""
    path = tmp_path / "last.pt"
    save(path, state(1.0))
    save(path, state(2.0))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedError) as refusal:
        load(path)
    assert str(refusal.value) == f"checkpoint: {path} is damaged"
    taken, found, errors = load_latest(checkpoint.find(tmp_path))
    assert taken == tmp_path / "last.previous.pt"
    assert float(found["model"]["w"][0]) == 1.0
    assert list(map(str, errors)) == [str(refusal.value)]


def test_all_damaged(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "last.previous.pt"
    last.write_bytes(b"")
    with pytest.raises(CheckpointError) as refusal:
        load_latest([last])
    assert str(refusal.value) == f"checkpoint: {last} is damaged: remove this file, and begin anew"
    previous.write_bytes(b"hello")
    save(tmp_path / "best.pt", state(1.0))
    with pytest.raises(CheckpointError) as refusal:
        load_latest([last, previous])
    assert str(refusal.value) == (
        f"checkpoint: {last} is damaged; checkpoint: {previous} is not a checkpoint of this "
        "trainer: remove these files, and rename best.pt to last.pt to go on from it"
    )


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    """Catches work that is thrown away by an older version, which can't read it."""
    for number in (1, 99):
        save(tmp_path / "last.pt", state(1.0) | {"format": number})
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        load_latest(checkpoint.find(tmp_path))


def legacy(path: Path) -> None:
    """As MoCo's were written before torch 1.6."""
    states = {"epoch": 200, "arch": "resnet50", "state_dict": {}, "optimizer": {}}
    torch.save(states, path, _use_new_zipfile_serialization=False)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"no pickle")


OTHERS: dict[str, Callable[[Path], object]] = {
    "legacy": legacy,
    "current": lambda path: torch.save({"state_dict": {}}, path),
    "whole model": lambda path: torch.save(torch.nn.Linear(1, 1), path),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "zip": zipped,
    "table": lambda path: path.write_text("epoch,step\n1,2\n"),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"epoch": 1})),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_no_checkpoint_of_ours(tmp_path: Path, kind: str) -> None:
    """Catches the advice to remove somebody's file because it is "damaged"."""
    path = tmp_path / "checkpoint_0199.pth.tar"
    OTHERS[kind](path)
    with pytest.raises(DamagedError) as refusal:
        load(path)
    assert str(refusal.value) == f"checkpoint: {path} is not a checkpoint of this trainer"


def test_none_at_all_and_another_format(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match=r"last\.pt does not exist"):
        load(path)
    with pytest.raises(CheckpointError, match=r"is a folder; name a file in it, as last\.pt"):
        load(tmp_path)
    torch.save(state(1.0) | {"format": 99}, path)
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        load(path)


def test_runs_no_code_of_a_file(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/evil",)

    torch.save(state(1.0) | {"curve": Evil()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this trainer"):
        load(tmp_path / "last.pt")
    assert not (tmp_path / "evil").exists()


def test_torch_reads_it_too(tmp_path: Path) -> None:
    save(tmp_path / "last.pt", state(1.0))
    assert zipfile.is_zipfile(tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True).keys() == PARTS


def test_one_run_per_folder(tmp_path: Path) -> None:
    (tmp_path / "last.pt.1.tmp").write_bytes(b"left by a run that was killed")
    with folder_lock(tmp_path):
        assert not list(tmp_path.glob("*.tmp"))
        with (
            pytest.raises(CheckpointError, match="another run is writing to"),
            folder_lock(tmp_path, patience=0.1),
        ):
            pass
        assert (tmp_path / ".lock").exists()
    with folder_lock(tmp_path):
        pass


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two in one folder: one holds the file, the other what was a file when it came."""
    flock, calls = fcntl.flock, 0

    def slow(file: Any, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the one before is leaving just now
            (tmp_path / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").exists()
        with pytest.raises(HeldError), folder_lock(tmp_path, patience=0):
            pass


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    """Neither its lock, nor folders made for it; one with a file in it stays, as do others'."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "mine" / "runs" / "moco"):
        1 / 0  # noqa: B018
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with folder_lock(tmp_path / "runs" / "moco"):
        (tmp_path / "runs" / "moco" / "last.pt").touch()
    assert names(tmp_path / "runs" / "moco") == {"last.pt"}


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(CheckpointError, match=r"can't read .*file\.json: No such file"):
        read_json(path)
    write_json(path, {"a": [1, None]})
    assert read_json(path) == {"a": [1, None]}
    for content in (b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"file\.json is not JSON"):
            read_json(path)


def test_all_changes_are_named() -> None:
    before: State = {"config": {"a": {"lr": 1, "output": "x"}}, "world_size": 2}
    now: State = {"config": {"a": {"lr": 2, "output": "y"}}, "world_size": 3, "device": "cpu"}
    expected = (
        r"call: file was begun with another --lr \(was 1, is 2\), number of ranks \(was 2, is 3\)"
    )
    with pytest.raises(CheckpointError, match=expected):
        refuse_changes("call", Path("file"), before, now)
    with pytest.raises(CheckpointError, match=r"another device \(was cuda, is cpu\)"):
        refuse_changes(
            "call", Path("file"), before | {"device": "cuda"}, before | {"device": "cpu"}
        )
    refuse_changes("call", Path("file"), before, now | {"world_size": 2}, FREE | {"lr"})
    with pytest.raises(CheckpointError, match="does not say what was begun"):
        refuse_changes("call", Path("file"), {}, now)
