"""Damaged images, by hundreds: each is read, or refused in one line that names it.

They follow from their numbers alone. `DAMAGED_IMAGES=3000 pytest FILE` tries more of them.
"""

import io
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moco.moco_runs import COMMAND, run
from shuffle_batchnorm.moco.cli import main
from shuffle_batchnorm.moco.data.decode import read_image
from shuffle_batchnorm.moco.data.folders import FolderImages
from shuffle_batchnorm.moco.data.images import DataError
from shuffle_batchnorm.moco.data.loading import make_loader

COUNT = int(os.environ.get("DAMAGED_IMAGES", "300"))
FLAGS = "--dataset imagefolder --image-size 8 --groups 2 --batch-size 8 --queue 16 --epochs 1"
FLAGS += " --no-tensorboard --device cpu --augment none --ranks 1"
ENCODINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("RGB", "jpeg", {}),
    ("L", "jpeg", {"progressive": True}),
    ("CMYK", "jpeg", {}),
    ("RGB", "png", {}),
    ("P", "png", {"transparency": 3}),
    ("I;16", "png", {}),
    ("RGB", "webp", {}),
    ("RGBA", "webp", {"lossless": True}),
    ("RGB", "tiff", {}),
    ("RGB", "tiff", {"compression": "tiff_lzw"}),
    ("RGB", "tiff", {"compression": "jpeg"}),
    ("1", "tiff", {"compression": "group4"}),
    ("RGB", "bmp", {}),
    ("RGB", "ppm", {}),
)


def originals() -> list[tuple[str, bytes]]:
    """Whole images, with metadata where they can hold some: suffix and content."""
    waves = np.outer(np.sin(np.arange(40) / 3), np.cos(np.arange(56) / 5))
    picture = Image.fromarray((127 + 120 * waves).astype(np.uint8))
    exif = Image.Exif()
    exif[274], exif[305] = 6, "a camera"
    found = []
    for mode, suffix, options in ENCODINGS:
        file = io.BytesIO()
        metadata = {} if suffix in ("bmp", "ppm") else {"exif": exif}
        picture.convert(mode).save(file, suffix, **options, **metadata)
        found.append((suffix, file.getvalue()))
    return found


WHOLE = originals()


def damaged(number: int) -> tuple[str, bytes]:
    """Return the suffix and content of a damaged image."""
    chance = random.Random(number)
    suffix, whole = WHOLE[number % len(WHOLE)]
    data = bytearray(whole)
    place = chance.randrange(len(data))
    match chance.choice(("bytes", "header", "cut", "hole", "gap", "beginning", "name")):
        case "bytes":
            for _ in range(chance.randint(1, 16)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case "header":
            for _ in range(chance.randint(1, 4)):
                data[chance.randrange(min(64, len(data)))] = chance.randrange(256)
        case "cut":
            del data[place:]
        case "hole":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        case "gap":
            del data[place : place + chance.randint(1, 64)]
        case "beginning":  # that of another image
            length = chance.randint(4, 64)
            data[:length] = chance.choice(WHOLE)[1][:length]
        case "name":
            suffix = chance.choice(WHOLE)[0]
            data[place] ^= 1 << chance.randrange(8)
    return suffix, bytes(data)


def write(folder: Path, numbers: range) -> list[Path]:
    """Write damaged images into a folder, by name in the order of their numbers."""
    folder.mkdir(parents=True)
    paths = []
    for number in numbers:
        suffix, data = damaged(number)
        paths.append(folder / f"{number:05}.{suffix}")
        paths[-1].write_bytes(data)
    return paths


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Each damaged image and why it is refused, or an empty text."""
    found = {}
    for path in write(tmp_path_factory.mktemp("damaged") / "a", range(COUNT)):
        found[path] = ""
        try:
            image = read_image(str(path), 8)
        except DataError as error:
            found[path] = str(error)
        else:
            assert image.shape == (3, 8, 8)
    return found


def test_read_or_refused(outcomes: dict[Path, str]) -> None:
    """Catches an error of another kind, a second line, and a warning."""
    refused = {path: text for path, text in outcomes.items() if text}
    for path, text in refused.items():
        reason = text.removeprefix(f"train: {path} can't be read as an image: ")
        assert reason != text
        assert 3 < len(reason) < 300
        assert reason.isprintable()
    # Of both kinds there are many, or nothing is tested.
    assert COUNT / 4 < len(refused) < COUNT * 3 / 4


class Remaining:
    """Batches of one image, from one on."""

    def __init__(self, count: int) -> None:
        self.first, self.count = 0, count

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[index] for index in range(self.first, self.count)])


@pytest.mark.parametrize("workers", [0, 2])
def test_so_by_a_loader(
    outcomes: dict[Path, str], workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of a worker's, too, and what a C library prints."""
    [folder] = {path.parent.parent for path in outcomes}
    batches = Remaining(COUNT)
    loader = make_loader(FolderImages(folder, 8), batches, workers)
    found: list[str] = []
    while len(found) < COUNT:
        batches.first = len(found)
        try:
            for _ in loader:
                found.append("")  # noqa: PERF401
        except DataError as error:
            found.append(str(error))
    assert found == list(outcomes.values())
    assert capfd.readouterr() == ("", "")


def data_set(folder: Path, bad: Path) -> Path:
    """Return where a bad image is in a data set of good ones."""
    good = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for part, name in itertools.product(("train", "val"), "ab"):
        (folder / part / name).mkdir(parents=True)
        for number in range(12):
            good.save(folder / part / name / f"{number}.png")
    place = folder / "train" / "b" / bad.name
    place.write_bytes(bad.read_bytes())
    return place


def test_so_by_the_command(
    outcomes: dict[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = [path for path, text in outcomes.items() if text]
    for bad in refused[:: max(1, len(refused) * 100 // COUNT)]:
        place = data_set(tmp_path / bad.name, bad)
        words = [*FLAGS.split(), "--data-path", str(tmp_path / bad.name), "--output"]
        assert main(["train", *words, str(tmp_path / bad.name / "run")]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == outcomes[bad].replace(str(bad), str(place))


def test_so_by_the_command_with_workers(outcomes: dict[Path, str], tmp_path: Path) -> None:
    """In a process of its own, from its beginning to its end."""
    refused = [path for path, text in outcomes.items() if text]
    for bad in refused[:: max(1, len(refused) * 500 // COUNT)]:
        place = data_set(tmp_path / bad.name, bad)
        words = [*FLAGS.split(), "--data-path", str(tmp_path / bad.name), "--workers", "2"]
        command = [*COMMAND, "train", *words, "--output", str(tmp_path / bad.name / "run")]
        _, stderr = run(*command, code=2)
        assert stderr.splitlines()[-1] == outcomes[bad].replace(str(bad), str(place))
