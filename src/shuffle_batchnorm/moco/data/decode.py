"""One image file to a tensor: upright, in 8-bit RGB, of one size."""

import ctypes
import functools
import logging
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shuffle_batchnorm.moco.config import CALL

from .images import DataError

# TIFF's tags, and what the second one has where 0 is white.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def read_image(path: str, side: int) -> Tensor:
    """Return an image file as uint8 ``[3, H, H]``: short side to H, centre cut out.

    It is turned upright by its EXIF orientation; what is transparent is laid on white; 16 bits are
    scaled to 8. Of several frames the first is taken.

    Args:
        path: of the file; its content says what it is, not its name.
        side: H.

    Raises:
        DataError: it is no image, damaged, larger than Pillow allows, or of a mode without a white.
    """
    from PIL import Image, ImageOps, _imaging

    _silence(_imaging.__file__)
    try:
        # Pillow warns of metadata that it skips, and of large images: either it reads or it raises.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            file.draft("RGB", (side, side))  # lets a JPEG be decoded at a fraction of its size
            file.load()
            with suppress(Exception):  # metadata alone is damaged: the image is as it is stored
                ImageOps.exif_transpose(file, in_place=True)
            fitted: Any = ImageOps.fit(_as_rgb(file), (side, side), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged file can make a decoder raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{CALL}: {path} can't be read as an image: {reason}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


@functools.cache
def _silence(pillow: str) -> None:
    """Keep Pillow's log and its libtiff from printing to stderr, where no file would be named."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(AttributeError, OSError):  # it has no libtiff, or one that can't be reached
        library = ctypes.CDLL(pillow)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def _as_rgb(image: Any) -> Any:
    """Return an image of any mode in RGB: 0 is black, the largest value of its format white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        [bits, *_] = tags.get(_BITS_PER_SAMPLE, (16,))
        grey = np.asarray(image).astype(np.float32) * (255 / (2**bits - 1))
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} doesn't say which value is white: save it in 8 bits")
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("RGB")
