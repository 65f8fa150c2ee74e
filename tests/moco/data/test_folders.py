"""Folders of images: labels, cropping, and what is missing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shuffle_batchnorm.moco.config import DataConfig
from shuffle_batchnorm.moco.data.folders import FolderImages, read_image
from shuffle_batchnorm.moco.data.images import DataError
from shuffle_batchnorm.moco.data.loading import load_data


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _make(folder: Path, held_out: str = "val") -> None:
    grey = np.full((20, 30, 3), 100, np.uint8)
    for part, names in (("train", ("b", "a", "c")), (held_out, ("c", "a"))):
        for name in names:
            for number in range(2):
                _save(folder / part / name / f"{number}.png", grey + ord(name) - ord("a"))
    (folder / "train" / "a" / "notes.txt").write_text("no image")
    _save(folder / "train" / "a" / "more" / "2.JPG", grey)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_labels_are_the_sorted_class_folders(tmp_path: Path, held_out: str) -> None:
    """In val too, where a class is missing: its c is still 2."""
    _make(tmp_path, held_out)
    images = load_data(DataConfig("imagefolder", tmp_path, image_size=8))
    train = [images.train[i] for i in range(7)]
    assert [label for _, label in train] == [0, 0, 0, 1, 1, 2, 2]
    assert [images.test[i][1] for i in range(4)] == [0, 0, 2, 2]
    assert images.test[3][0].unique().tolist() == [102]
    assert images.classes == 3
    assert {image.shape for image, _ in train} == {(3, 8, 8)}


def test_short_side_is_brought_to_size_and_the_centre_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:32], pixels[:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    _save(tmp_path / "flag.png", pixels)
    image = read_image(str(tmp_path / "flag.png"), 8)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(
        image[:, :, 1:-1], torch.tensor([0, 255, 0]).to(torch.uint8).view(3, 1, 1).expand(3, 8, 6)
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_kind_of_image_has_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode).save(path)
    assert read_image(str(path), 8).float().mean() == pytest.approx(200, abs=3)


def test_what_is_missing(tmp_path: Path) -> None:
    config = DataConfig("imagefolder", tmp_path)
    with pytest.raises(DataError, match=r"^train: --dataset imagefolder needs the folder .*train$"):
        load_data(config)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="train holds no class folder with images in it"):
        load_data(config)
    _make(tmp_path, "test")
    (tmp_path / "test" / "d").mkdir()
    with pytest.raises(DataError, match="test has the class d, which train has not"):
        load_data(config)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    _make(tmp_path)
    bad = tmp_path / "train" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    images = FolderImages(tmp_path / "train", 8)
    with pytest.raises(
        DataError, match=r"^train: .*b/1\.png can't be read as an image: "
    ) as caught:
        images[4]
    assert "\n" not in str(caught.value)
