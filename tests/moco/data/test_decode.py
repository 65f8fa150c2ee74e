"""Image files of every kind: upright, scaled to 8 bits, or refused in one line with their name."""

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shuffle_batchnorm.moco.config import DataConfig
from shuffle_batchnorm.moco.data.decode import read_image
from shuffle_batchnorm.moco.data.images import DataError
from shuffle_batchnorm.moco.data.loading import load_data

SIDE = 24
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262
# How an upright image is stored for each value of the tag.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def bands(levels: tuple[int, ...] = (0, 100, 255), dtype: Any = np.uint8) -> np.ndarray:
    """Horizontal bands of these values, black to white, on a square of SIDE."""
    return np.repeat(np.array(levels, dtype), SIDE // len(levels))[:, None].repeat(SIDE, 1)


def levels(image: Tensor) -> list[int]:
    """The values of three bands, the same in all channels."""
    assert (image.dtype, image.shape) == (torch.uint8, (3, SIDE, SIDE))
    middles = image[:, 4::8, SIDE // 2].int()
    assert middles.max(0).values.sub(middles.min(0).values).max() <= 3, "it has a colour"
    return middles[0].tolist()


def quadrants(scale: int) -> Image.Image:
    """A wide image that no turn or flip leaves as it is."""
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0], pixels[0, 1:], pixels[1, :2] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def refusal(path: Path) -> str:
    """The one line that says why a file is refused."""
    with pytest.raises(DataError) as error:
        read_image(str(path), SIDE)
    start = f"train: {path} can't be read as an image: "
    assert str(error.value).startswith(start)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value).removeprefix(start)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Catches an image that is turned the wrong way, twice (Pillow does it itself for TIFF), or
    only when a JPEG isn't decoded at a fraction of its size.
    """
    upright = quadrants(20 if orientation % 2 else 200)
    method = STORED[orientation]
    stored = upright if method is None else upright.transpose(method)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    upright.save(tmp_path / "upright.png")
    seen, expected = (
        read_image(str(tmp_path / n), SIDE).int() for n in (f"x.{suffix}", "upright.png")
    )
    # Lossy files blur the edges.
    assert seen.sub(expected).abs().gt(40).float().mean() < 0.06
    assert expected.unique().numel() > 2


def test_upright_when_held_out(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(bands()).save(tmp_path / part / "a" / "x.png", exif=exif)
    images = load_data(DataConfig("imagefolder", tmp_path, image_size=SIDE))
    assert [levels(part[0][0]) for part in (images.train, images.test)] == [[255, 100, 0]] * 2


TURNED = struct.pack("<HHII", ORIENTATION, 3, 1, 3)
BEYOND_THE_END = struct.pack("<HHII", 305, 2, 4000, 9_000_000)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("exif", "expected"),
    [
        (b"no EXIF at all", [0, 100, 255]),
        (b"II*\0\x08\0\0\0\xff\xff", [0, 100, 255]),
        (b"II*\0\x08\0\0\0\2\0" + TURNED + BEYOND_THE_END, [255, 100, 0]),
    ],
)
def test_damaged_metadata(tmp_path: Path, suffix: str, exif: bytes, expected: list[int]) -> None:
    """Catches a warning or an error of Pillow's, and an image upside down for a bad tag beside."""
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(bands()).save(path, exif=b"Exif\0\0" + exif, quality=95)
    assert levels(read_image(str(path), SIDE)) == pytest.approx(expected, abs=3)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("L", "jpg"), ("L", "ppm"), ("LA", "png"), ("LA", "tiff"), ("P", "png"), ("P", "bmp")),
        *(("PA", "tiff"), ("RGB", "bmp"), ("RGBA", "webp"), ("RGBA", "png"), ("RGBX", "tiff")),
        *(("CMYK", "jpg"), ("CMYK", "tiff"), ("YCbCr", "jpg"), ("LAB", "tiff")),
    ],
)
def test_modes_of_8_bits(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.fromarray(bands()).convert("RGB")
    if mode == "LAB":  # L is lightness: of an sRGB value of 100 it is 42 of 100
        lightness = Image.fromarray(bands((0, 108, 255)))
        image = Image.merge("LAB", (lightness, *[Image.new("L", image.size, 128)] * 2))
    image.convert(mode).save(tmp_path / f"x.{suffix}", quality=95)
    assert levels(read_image(str(tmp_path / f"x.{suffix}"), SIDE)) == pytest.approx(
        [0, 100, 255], abs=3
    )


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm", "bmp"])
def test_one_bit(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(bands((0, 255, 0))).convert("1").save(tmp_path / f"x.{suffix}")
    assert levels(read_image(str(tmp_path / f"x.{suffix}"), SIDE)) == [0, 255, 0]


@pytest.mark.parametrize(
    ("dtype", "suffix"), [("<u2", "png"), ("<u2", "tiff"), (">u2", "tiff"), ("<u2", "ppm")]
)
def test_16_bits_are_scaled(tmp_path: Path, dtype: str, suffix: str) -> None:
    """Catches what Pillow makes of them: all above 255 is white."""
    Image.fromarray(bands(dtype=dtype) * 257).save(tmp_path / f"x.{suffix}")
    assert levels(read_image(str(tmp_path / f"x.{suffix}"), SIDE)) == [0, 100, 255]


def entry(content: bytes, tag: int) -> int:
    """Where the value of a tag of a little-endian TIFF is, a tag with one value."""
    return content.index(struct.pack("<HHI", tag, 3, 1)) + 8


def test_tiffs_of_12_bits_and_with_a_white_zero(tmp_path: Path) -> None:
    """Both have the mode of 16 bits; by it alone one would be dark and the other a negative."""
    path = tmp_path / "x.tiff"
    Image.fromarray(bands(dtype="<u2") * 257).save(path)
    plain = path.read_bytes()
    negative = bytearray(plain)
    negative[entry(plain, PHOTOMETRIC)] = 0
    path.write_bytes(negative)
    assert levels(read_image(str(path), SIDE)) == [255, 155, 0]
    values = (bands(dtype=np.int64) * 4095 + 127) // 255
    first, second = values.reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    short = bytearray(plain)
    short[entry(plain, BITS_PER_SAMPLE)] = 12
    start = struct.unpack_from("<I", plain, plain.index(struct.pack("<HHI", 273, 4, 1)) + 8)[0]
    short[start : start + packed.size] = packed.astype(np.uint8).tobytes()
    path.write_bytes(short)
    assert levels(read_image(str(path), SIDE)) == [0, 100, 255]


@pytest.mark.parametrize(("dtype", "suffix"), [("f4", "tiff"), ("f4", "ppm"), ("i4", "tiff")])
def test_modes_without_a_white_are_refused(tmp_path: Path, dtype: str, suffix: str) -> None:
    """Catches an image that comes out black (values up to 1) or white (those above 255)."""
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(bands(dtype=dtype)).save(path)
    mode = "F" if dtype == "f4" else "I"
    assert refusal(path) == f"mode {mode} doesn't say which value is white: save it in 8 bits"


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    """Whatever colour a fully transparent pixel hides, black most often."""
    path = str(tmp_path / "x.png")
    black = Image.new("L", (SIDE, SIDE))
    alpha = Image.fromarray(bands((0, 128, 255)))
    for mode in ("LA", "RGBA"):
        image = black.convert(mode)
        image.putalpha(alpha)
        image.save(path)
        assert levels(read_image(path, SIDE)) == [255, 127, 0]
    for mode, transparent in (("L", 100), ("RGB", (100,) * 3), ("P", 100), ("1", 0)):
        image = Image.fromarray(bands()).convert("L").convert(mode)
        if mode == "P":
            image = Image.fromarray(bands(), "P")
            image.putpalette([value for value in range(256) for _ in range(3)])
        image.save(path, transparency=transparent)
        assert levels(read_image(path, SIDE)) == ([255] * 3 if mode == "1" else [0, 255, 255])


def test_short_side_is_brought_to_size_and_the_centre_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:32], pixels[:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "flag.png")
    image = read_image(str(tmp_path / "flag.png"), 8)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(
        image[:, :, 1:-1], torch.tensor([0, 255, 0]).to(torch.uint8).view(3, 1, 1).expand(3, 8, 6)
    )


def test_large_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Pillow's warning below its limit, and its own kind of error above it."""
    path = tmp_path / "x.png"
    Image.fromarray(bands()).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE**2 - 1)
    assert levels(read_image(str(path), SIDE)) == [0, 100, 255]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE**2 // 2 - 1)
    assert refusal(path).startswith("Image size (576 pixels) exceeds limit of 574 pixels")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (struct.error("unpack requires\na buffer"), "unpack requires a buffer"),
        (zlib.error("Error -3"), "Error -3"),
        (MemoryError(), "MemoryError"),
        (SyntaxError("broken PNG file"), "broken PNG file"),
        (AttributeError("no such thing"), "no such thing"),
    ],
)
def test_any_error_of_a_decoder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    Image.fromarray(bands()).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    assert refusal(tmp_path / "x.png") == reason


def no_image(_: bytes) -> bytes:
    return b"no image"


@pytest.mark.parametrize("damage", [no_image, lambda data: data[:60], lambda data: data[:0]])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    Image.fromarray(bands()).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(damage((tmp_path / "x.png").read_bytes()))
    assert refusal(tmp_path / "x.png")


def test_pillows_log_is_not_printed(tmp_path: Path) -> None:
    """Catches its line of a TIFF with too many samples, which Python prints if nobody handles it.

    Here pytest does; so this looks for the handler that stands for nobody.
    """
    test_a_missing_file_is_named(tmp_path)
    kinds = [type(handler) for handler in logging.getLogger("PIL").handlers]
    assert kinds.count(logging.NullHandler) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal(tmp_path / "x.png")
