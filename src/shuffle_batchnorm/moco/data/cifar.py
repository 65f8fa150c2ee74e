"""CIFAR-10 and CIFAR-100 as their authors give them out: pickled batches, in an archive or not."""

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shuffle_batchnorm.moco.config import CALL

from .images import ArrayImages, DataError

_SHAPE = (3, 32, 32)


class _Files(NamedTuple):
    """How one of the two data sets is stored."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: int


_FILES = {
    "cifar10": _Files(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        b"labels",
        10,
    ),
    "cifar100": _Files(
        "cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", b"fine_labels", 100
    ),
}


def archive_name(dataset: str) -> str:
    """Return the name of the archive of ``cifar10`` or ``cifar100``."""
    return _FILES[dataset].archive


def read_cifar(dataset: str, path: Path) -> tuple[ArrayImages, ArrayImages, int]:
    """Read CIFAR from its archive or from the folder in it.

    A pickle can hold code; one with anything but arrays, bytes and numbers is refused.

    Args:
        dataset: ``cifar10`` or ``cifar100``.
        path: the archive, the folder in it, or a folder that holds one of them.

    Returns:
        The images to train on, those to test on, and the number of classes.

    Raises:
        DataError: nothing there, an archive that is cut off or another one, a missing batch, a
            batch that isn't one of CIFAR.
    """
    files = _FILES[dataset]
    wanted = [*files.train, files.test]
    batches = _read_batches(files, wanted, path, f"{CALL}: --data-path {path}")
    parts = [_decode(batches[name], files, f"{CALL}: {name} in {path}") for name in wanted]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True))
    return ArrayImages(images, labels), ArrayImages(*parts[-1]), files.classes


def _read_batches(files: _Files, wanted: list[str], path: Path, call: str) -> dict[str, bytes]:
    """Return the pickled batches by name, from wherever they are."""
    for folder in (path / files.folder, path):
        if (folder / wanted[0]).is_file():
            found = {name: folder / name for name in wanted if (folder / name).is_file()}
            _check_complete(set(found), wanted, call)
            return {name: file.read_bytes() for name, file in found.items()}
    archive = path if path.is_file() else path / files.archive
    if not archive.is_file():
        raise DataError(f"{call} holds neither {files.archive} nor {files.folder}")
    try:
        batches = _unpack(archive, files.folder, set(wanted))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{call}: {archive.name} is damaged or no .tar.gz archive: {error}"
        ) from error
    _check_complete(set(batches), wanted, call)
    return batches


def _unpack(archive: Path, folder: str, wanted: set[str]) -> dict[str, bytes]:
    batches = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            *_, parent, name = ("", *Path(member.name).parts)
            if member.isfile() and parent == folder and name in wanted:
                stream = tar.extractfile(member)
                batches[name] = b"" if stream is None else stream.read()
        # What lies behind the last file too: the checksum of all of it is at the very end.
        while tar.fileobj is not None and tar.fileobj.read(1 << 20):
            pass
    return batches


def _check_complete(found: set[str], wanted: list[str], call: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{call} lacks {', '.join(missing)}: is it another data set, or cut off?")


def _decode(content: bytes, files: _Files, call: str) -> tuple[Tensor, Tensor]:
    """Return the images ``[M, 3, 32, 32]`` and labels ``[M]`` of a pickled batch."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{call} is not a batch of CIFAR: {error!r}") from error
    data = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(files.labels) if isinstance(batch, dict) else None
    if not isinstance(data, np.ndarray) or not isinstance(labels, list):
        raise DataError(f"{call} has no images or no {files.labels.decode()}")
    pixels = int(np.prod(_SHAPE))
    if data.dtype != np.uint8 or data.shape != (len(labels), pixels):
        raise DataError(
            f"{call} holds {data.dtype} {data.shape}, not uint8 {(len(labels), pixels)}"
        )
    numbers = torch.tensor(labels)
    if (
        numbers.is_floating_point()
        or not 0 <= int(numbers.min()) <= int(numbers.max()) < files.classes
    ):
        raise DataError(f"{call} has labels that are not whole numbers below {files.classes}")
    return torch.from_numpy(data.reshape(-1, *_SHAPE).copy()), numbers


class _Unpickler(pickle.Unpickler):
    """Makes arrays, and refuses to call anything else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which an array does not need")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # numpy has moved its function since the archives were made, and warns of its old name.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}
