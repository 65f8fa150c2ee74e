"""CIFAR's archives: read as they are given out, refused when damaged, never executed."""

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shuffle_batchnorm.moco.config import DataConfig
from shuffle_batchnorm.moco.data.cifar import read_cifar
from shuffle_batchnorm.moco.data.images import DataError
from shuffle_batchnorm.moco.data.loading import load_data

_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


def _as_python_2(pixels: np.ndarray, labels: list[int], name: str = "labels") -> bytes:
    """A batch as Python 2 pickled the real ones: byte strings, and numpy's module of that time."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01" + b"".join(b"J" + struct.pack("<i", n) for n in pixels.shape) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + text(pixels.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(name.encode()) + numbers + b"u."


def _batch(n: int, first: int, label_name: str = "labels", **changes: Any) -> bytes:
    pixels = (np.arange(n * 3072).reshape(n, 3072) + first).astype(np.uint8)
    labels = [(first + i) % 10 for i in range(n)]
    if not changes:
        return _as_python_2(pixels, labels, label_name)
    batch = {b"data": pixels, label_name.encode(): labels}
    return pickle.dumps({**batch, **{k.encode(): v for k, v in changes.items()}}, protocol=4)


def _cifar10() -> dict[str, bytes]:
    batches = {name: _batch(3, 3 * i) for i, name in enumerate(_TRAIN)}
    return {**batches, "test_batch": _batch(2, 50), "batches.meta": b"anything"}


def _write_archive(folder: Path, batches: dict[str, bytes], dataset: str = "cifar10") -> Path:
    path = folder / _ARCHIVES[dataset]
    with tarfile.open(path, "w:gz") as tar:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"{_FOLDERS[dataset]}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _write_folder(folder: Path, batches: dict[str, bytes]) -> Path:
    path = folder / _FOLDERS["cifar10"]
    path.mkdir()
    for name, content in batches.items():
        (path / name).write_bytes(content)
    return path


def test_archive_and_folder_hold_the_same(tmp_path: Path) -> None:
    """Wherever --data-path points at: the archive, the folder in it, or what they lie in."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    archive, folder = _write_archive(places[0], _cifar10()), _write_folder(places[1], _cifar10())
    for path in (archive, places[0], folder, places[1]):
        train, test, classes = read_cifar("cifar10", path)
        assert (len(train), len(test), classes) == (15, 2, 10)
        # Batches in their order, a row as red, green and blue planes.
        assert train.labels.tolist() == [i % 10 for i in range(15)]
        row = (torch.arange(3072) + 3072 + 3).to(torch.uint8)
        torch.testing.assert_close(train[4][0], row.view(3, 32, 32))


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    batches = {name: _batch(4, 7, "fine_labels") for name in ("train", "test", "meta")}
    _write_archive(tmp_path, batches, "cifar100")
    train, _, classes = read_cifar("cifar100", tmp_path)
    assert classes == 100
    assert train.labels.tolist() == [7, 8, 9, 0]


def test_images_of_another_size(tmp_path: Path) -> None:
    _write_archive(tmp_path, _cifar10())
    images = load_data(DataConfig("cifar10", tmp_path, image_size=16))
    assert images.train[0][0].shape == (3, 16, 16)
    assert images.train[0][0].dtype == torch.uint8
    assert (images.image_size, images.channels) == (16, 3)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_cifar("cifar10", tmp_path)
    assert str(caught.value) == (
        f"train: --data-path {tmp_path} holds neither cifar-10-python.tar.gz nor "
        "cifar-10-batches-py"
    )


@pytest.mark.parametrize("damage", ["cut off", "no archive", "flipped"])
def test_damaged_archive(tmp_path: Path, damage: str) -> None:
    noise = np.random.default_rng(0).bytes(20_000)  # does not compress
    path = _write_archive(tmp_path, {"noise": noise, **_cifar10()})
    content = bytearray(path.read_bytes())
    if damage == "cut off":
        content = content[: len(content) // 2]
    elif damage == "no archive":
        content = bytearray(b"<html>Not found</html>")
    else:
        content[len(content) // 2] ^= 255  # in the noise: only the checksum can tell
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is damaged") as caught:
        read_cifar("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [_write_archive, _write_folder])
def test_missing_batches(tmp_path: Path, write: Any) -> None:
    batches = _cifar10()
    del batches["data_batch_3"], batches["test_batch"]
    write(tmp_path, batches)
    with pytest.raises(DataError, match="lacks data_batch_3, test_batch"):
        read_cifar("cifar10", tmp_path)


def test_the_other_cifar(tmp_path: Path) -> None:
    """An archive of CIFAR-100 under the name of CIFAR-10."""
    batches = {name: _batch(4, 7, "fine_labels") for name in ("train", "test")}
    path = _write_archive(tmp_path, batches, "cifar100")
    path.rename(tmp_path / _ARCHIVES["cifar10"])
    with pytest.raises(DataError, match=r"lacks data_batch_1, .*another data set"):
        read_cifar("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a batch of CIFAR"),
        (_batch(3, 0)[:900], "is not a batch of CIFAR"),
        (pickle.dumps([1, 2]), "has no images or no labels"),
        (_batch(3, 0, "fine_labels"), "has no images or no labels"),
        (_batch(3, 0, labels=[1, 2]), r"holds uint8 \(3, 3072\), not uint8 \(2, 3072\)"),
        (_batch(3, 0, labels=[1, 2, 10]), "labels that are not whole numbers below 10"),
        (_batch(3, 0, labels=[1, 2, 0.5]), "labels that are not whole numbers below 10"),
    ],
)
def test_a_batch_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    _write_folder(tmp_path, {**_cifar10(), "data_batch_2": content})
    with pytest.raises(DataError, match=f"^train: data_batch_2 in .* {message}") as caught:
        read_cifar("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


class _Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = pickle.dumps({b"data": _Attack(trace)})
    pickle.loads(content)
    assert trace.exists()
    trace.unlink()
    _write_folder(tmp_path, {**_cifar10(), "data_batch_1": content})
    with pytest.raises(DataError, match=r"names pathlib.*, which an array does not need"):
        read_cifar("cifar10", tmp_path)
    assert not trace.exists()
