"""Folders of images: labels, what is skipped, what is followed, and what is missing."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shuffle_batchnorm.moco.config import DataConfig
from shuffle_batchnorm.moco.data.folders import SUFFIXES, FolderImages
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


def test_what_is_missing(tmp_path: Path) -> None:
    config = DataConfig("imagefolder", tmp_path)
    with pytest.raises(DataError, match=r"^train: --dataset imagefolder needs the folder .*train$"):
        load_data(config)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="train holds no class folder with images in it"):
        load_data(config)
    _make(tmp_path, "test")
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"needs the folder .*/val or .*/test$"):
        load_data(config)
    (tmp_path / "elsewhere").rename(tmp_path / "test")
    (tmp_path / "test" / "d").mkdir()
    with pytest.raises(DataError, match="test has the class d, which train has not"):
        load_data(config)


def _labels(folder: Path, classes: list[str] | None = None) -> list[tuple[str, str]]:
    """The class and the path of every image."""
    images = FolderImages(folder, 8, classes)
    paths = [str(Path(path).relative_to(folder)) for path in images.paths]
    return list(zip((images.classes[label] for label in images.labels), paths, strict=True))


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "@tmp"])
def test_what_is_no_data_is_skipped(tmp_path: Path, name: str) -> None:
    """As a class, deeper down, and as a file; catches labels that it has moved by one."""
    _make(tmp_path)
    before = _labels(tmp_path / "train")
    image = (tmp_path / "train" / "a" / "0.png").read_bytes()
    for folder in ("train", "train/a", "train/a/more", "val"):
        (tmp_path / folder / name).mkdir()
        (tmp_path / folder / name / "0.png").write_bytes(image)
    for file in ("._0.png", f"{name}.jpg"):
        (tmp_path / "train" / "a" / file).write_bytes(b"no image")
    assert _labels(tmp_path / "train") == before
    assert load_data(DataConfig("imagefolder", tmp_path)).classes == 3


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    """The names that are skipped are those of the data, not those of the way to it."""
    _make(tmp_path / ".cache" / "@me")
    assert len(FolderImages(tmp_path / ".cache" / "@me" / "train", 8)) == 7


def test_a_folder_with_the_name_of_an_image_is_none(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / "train" / "a" / "9.png").mkdir()
    assert len(FolderImages(tmp_path / "train", 8)) == 7


def test_links_are_followed(tmp_path: Path) -> None:
    """To a class, to a part of one, to a file; in their place in the order."""
    _make(tmp_path)
    before = _labels(tmp_path / "train")
    for name, kept in (("b", "train"), ("more", "train/a"), ("1.png", "val/c")):
        moved = tmp_path / "elsewhere" / name
        moved.parent.mkdir(exist_ok=True)
        (tmp_path / kept / name).rename(moved)
        (tmp_path / kept / name).symlink_to(moved)
    assert _labels(tmp_path / "train") == before
    assert len(load_data(DataConfig("imagefolder", tmp_path)).test) == 4  # type: ignore[arg-type]


def test_links_in_a_circle_add_nothing(tmp_path: Path) -> None:
    """Catches images twice, under another class, or for ever."""
    _make(tmp_path)
    before = _labels(tmp_path / "train")
    a = tmp_path / "train" / "a"
    for name, target in (("self", a), ("up", a.parent), ("top", tmp_path), ("again", a / "more")):
        (a / name).symlink_to(target)
    assert [label for label, _ in _labels(tmp_path / "train")] == [label for label, _ in before]


@pytest.mark.parametrize("where", ["train/d", "train/a/part", "val/c/more/part"])
def test_links_to_nothing_are_named(tmp_path: Path, where: str) -> None:
    """Catches a class, or a part of it, that is silently lost with a disk that isn't mounted."""
    _make(tmp_path)
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).symlink_to("/no/such/disk")
    with pytest.raises(DataError) as error:
        load_data(DataConfig("imagefolder", tmp_path))
    path = tmp_path / where
    assert str(error.value) == f"train: {path} is a link to /no/such/disk, which isn't there"


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path)
    really_scan = os.scandir

    def scan(path: str) -> Any:
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(DataError, match=r"^train: can't read .*/a/more: Permission denied$"):
        FolderImages(tmp_path / "train", 8)


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / "train" / "d" / "more").mkdir(parents=True)
    (tmp_path / "train" / "d" / "0.gif").write_bytes(b"of another kind")
    with pytest.raises(DataError) as error:
        FolderImages(tmp_path / "train", 8)
    what = f"the class {tmp_path}/train/d holds no image ({', '.join(SUFFIXES)})"
    assert str(error.value) == f"train: {what}"


def test_what_should_be_known_is_said(tmp_path: Path) -> None:
    """One class; classes that are missing where they are tested, empty ones too; all there."""
    _make(tmp_path / "some")
    (tmp_path / "some" / "val" / "b").mkdir()
    _make(tmp_path / "one")
    for part in ("train", "val"):
        for name in ("b", "c"):
            shutil.rmtree(tmp_path / "one" / part / name, ignore_errors=True)
    _make(tmp_path / "all")
    shutil.copytree(tmp_path / "all" / "train" / "b", tmp_path / "all" / "val" / "b")
    some, one, everything = (
        load_data(DataConfig("imagefolder", tmp_path / name)).remarks
        for name in ("some", "one", "all")
    )
    what = f"{tmp_path}/some/val has no image of 1 of 3 classes (b)"
    assert some == (f"{what}: kNN and the linear probe are measured on the others",)
    assert one == (f"{tmp_path}/one has one class, a: kNN and the linear probe are left out",)
    assert everything == ()


def test_test_images_are_not_spoken_of_where_they_are_not_used(tmp_path: Path) -> None:
    """Catches a warning of classes that kNN lacks, where it is measured on training images."""
    _make(tmp_path)
    assert load_data(DataConfig("imagefolder", tmp_path, image_size=8)).remarks
    [said] = load_data(DataConfig("imagefolder", tmp_path, 8, validation=True)).remarks
    assert "of test images" in said
    for part in ("train", "val"):
        for name in ("b", "c"):
            shutil.rmtree(tmp_path / part / name, ignore_errors=True)
    remark, _ = load_data(DataConfig("imagefolder", tmp_path, 8, validation=True)).remarks
    assert "one class" in remark


def test_many_missing_classes_are_counted(tmp_path: Path) -> None:
    for name in "abcdefgh":
        _save(tmp_path / "train" / name / "0.png", np.zeros((8, 8, 3), np.uint8))
    _save(tmp_path / "test" / "h" / "0.png", np.zeros((8, 8, 3), np.uint8))
    [remark] = load_data(DataConfig("imagefolder", tmp_path)).remarks
    assert "test has no image of 7 of 8 classes (a, b, c, d, e, ...): " in remark


def test_a_folder_that_is_a_link_to_its_parent(tmp_path: Path) -> None:
    """Catches a traceback where the walk finds nothing that is below."""
    (tmp_path / "train").symlink_to(tmp_path)
    with pytest.raises(DataError, match="train holds no class folder with images in it"):
        FolderImages(tmp_path / "train", 8)
