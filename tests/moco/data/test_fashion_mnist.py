"""Fashion-MNIST's files: read as they are given out, wherever they lie, refused when damaged."""

import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm.moco.config import DataConfig
from shuffle_batchnorm.moco.data import fashion_mnist
from shuffle_batchnorm.moco.data.fashion_mnist import read_fashion_mnist
from shuffle_batchnorm.moco.data.images import DataError
from shuffle_batchnorm.moco.data.loading import load_data

_IMAGES = torch.arange(5 * 28 * 28).remainder(251).to(torch.uint8).view(5, 28, 28)
_LABELS = torch.tensor([3, 9, 0, 3, 7], dtype=torch.uint8)


def _idx(array: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4) for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + bytes(array.flatten().tolist())


def _files() -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte": _idx(_IMAGES),
        "train-labels-idx1-ubyte": _idx(_LABELS),
        "t10k-images-idx3-ubyte": _idx(_IMAGES[:2] // 2),
        "t10k-labels-idx1-ubyte": _idx(_LABELS[:2]),
    }


def _write(folder: Path, files: dict[str, bytes], packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw", "fashion-mnist"])
def test_files_hold_what_was_written(below: str, packed: bool, tmp_path: Path) -> None:
    """Gzipped or not, in the folder given or in the one that others unpack them in."""
    _write(tmp_path / below, _files(), packed)
    train, test = read_fashion_mnist(tmp_path)
    assert torch.equal(train.images, _IMAGES.unsqueeze(1))
    assert train.labels.tolist() == _LABELS.tolist()
    assert train.labels.dtype == torch.int64
    assert torch.equal(test.images, _IMAGES[:2].unsqueeze(1) // 2)
    assert test.labels.tolist() == [3, 9]


def test_a_file_of_each_kind(tmp_path: Path) -> None:
    """One that was unpacked is preferred to the archive beside it."""
    _write(tmp_path, _files())
    other = _idx(255 - _IMAGES)
    _write(tmp_path, {"train-images-idx3-ubyte": other}, packed=False)
    assert torch.equal(read_fashion_mnist(tmp_path)[0].images, 255 - _IMAGES.unsqueeze(1))


def test_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --data-path from where Debian puts it; statistics of the training images."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", _write(tmp_path / "debian", _files()))
    images = load_data(DataConfig("fashion-mnist"))
    assert (images.classes, images.channels, images.image_size) == (10, 1, 28)
    values = _IMAGES.double() / 255
    assert images.mean == pytest.approx((float(values.mean()),))
    assert images.std == pytest.approx((float(values.std()),))
    small = load_data(DataConfig("fashion-mnist", tmp_path / "debian", image_size=14))
    assert small.test[0][0].shape == (1, 14, 14)


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    with pytest.raises(DataError, match=r"^train: --dataset fashion-mnist needs --data-path, the "):
        load_data(DataConfig("fashion-mnist"))
    with pytest.raises(DataError, match=r"has no train-images-idx3-ubyte or \.gz; it is the"):
        load_data(DataConfig("fashion-mnist", tmp_path))


@pytest.mark.parametrize("name", [name for name in _files() if name != "train-images-idx3-ubyte"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    files = {key: content for key, content in _files().items() if key != name}
    _write(tmp_path, files)
    with pytest.raises(DataError, match=f"lacks {name[:-12]}"):
        read_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file of bytes: 0 bytes, which begin with nothing"),
        (b"\0\0\x08", "no IDX file"),
        (
            b"\0\0\x0d" + _idx(_IMAGES)[3:],
            "of bytes: 3936 bytes, which begin with 00 00 0d",
        ),
        (_idx(_IMAGES)[:-1], "damaged or no IDX file"),
        (_idx(_IMAGES) + b"\0", "damaged or no IDX file"),
        (_idx(_IMAGES)[:9], "damaged or no IDX file"),
        (_idx(_IMAGES[:0]), "16 bytes, which begin with 00 00 08 03"),
        (_idx(_LABELS), r"images \[5\] and labels \[5\], not \[M, H, H\] and \[M\]"),
        (_idx(_IMAGES[:4]), r"images \[4, 28, 28\] and labels \[5\]"),
        (_idx(_IMAGES[:, :, :14]), "28 x 14"),
    ],
)
def test_a_damaged_file(content: bytes, message: str, tmp_path: Path) -> None:
    _write(tmp_path, {**_files(), "train-images-idx3-ubyte": content}, packed=False)
    with pytest.raises(DataError, match=message):
        read_fashion_mnist(tmp_path)


def test_labels_of_another_data_set(tmp_path: Path) -> None:
    _write(tmp_path, {**_files(), "t10k-labels-idx1-ubyte": _idx(_LABELS[:2] + 7)})
    with pytest.raises(DataError, match="t10k has images of 28 x 28 and labels up to 16"):
        read_fashion_mnist(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b[:40] + b"\7" * 9 + b[49:]])
def test_a_damaged_archive(damage: object, tmp_path: Path) -> None:
    """Cut off, and with other bytes inside: gzip's own error comes with the file's name."""
    path = _write(tmp_path, _files()) / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        read_fashion_mnist(tmp_path)
