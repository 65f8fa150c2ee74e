"""How the Triton kernels cut their work into programs: plain arithmetic, without Triton.

Both layouts are dense memory ``[N, outer, inner]``: ``[N, C, L]`` if contiguous, ``[N, L, C]`` if
channels-last. A tile is ROWS samples, or ROWS runs of OUTER positions of a block if channels-last,
times OUTER times INNER.

Nothing is tuned by timing. The bits of a sum depend on its tiles, and what it is cut into must not
depend on a machine's mood: ranks would differ. The elementwise kernels copy, and any tile with a
few accesses of 16 bytes per thread does so at the speed of memory. So no step stops to try tiles,
whatever its batch size, and a CUDA graph needs one warm-up call.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

Sizes = tuple[int, ...]
Shape = tuple[int, ...]

_THREADS = 128
_ROWS = 4  # tiles that a program loads at once
_STEPS = 4  # loads of ROWS tiles that are worth a program of their own
_UNSPLIT = 8  # as many are not worth a second launch
_PROGRAMS = 4096  # fill a GPU several times; fixed, so that every GPU adds in the same order
MERGED = 1024  # splits of blocks that one program can merge


class Tiles(NamedTuple):
    """The work of one launch.

    Attributes:
        programs: in all.
        splits: programs that share a block's channels; 1 in the elementwise kernels.
        arguments: of the kernel, by name.
        table: where blocks start ``[blocks + 1]``, or the block of each sample ``[N]``.
    """

    programs: int
    splits: int
    arguments: dict[str, int | bool]
    table: tuple[int, ...]


@lru_cache(maxsize=1024)
def reduction(
    shape: Shape, sizes: Sizes, channels_last: bool, itemsize: int, members: int = 1
) -> Tiles:
    """Return how to sum blocks: a program takes some channels of a block, or a split of them.

    `members` are the blocks that are merged to one.
    """
    channels, length, outer, inner = _memory(shape, channels_last)
    lanes = _tile_size(inner, itemsize, accesses=1, narrow=4)
    most = max(sizes)
    width = _fit(inner, lanes, channels_last)
    height = min(lanes // width, _power(most * length if channels_last else outer))
    rows = -(-most * length // height) if channels_last else most
    depth = min(_ROWS, _power(rows))
    steps = -(-rows // depth) * (1 if channels_last else -(-inner // width))
    tiles = -(-channels // (width if channels_last else height))
    splits = 1
    if steps > _UNSPLIT:
        splits = max(1, min(_PROGRAMS // (tiles * len(sizes)), steps // _STEPS, MERGED // members))
    starts = [0]
    for n in sizes:
        starts.append(starts[-1] + n)
    arguments = _arguments(outer, inner, channels_last, depth, height, width)
    return Tiles(len(sizes) * splits * tiles, splits, arguments, tuple(starts))


@lru_cache(maxsize=1024)
def elementwise(shape: Shape, sizes: Sizes, channels_last: bool, itemsize: int) -> Tiles:
    """Return how to map all values: a program takes one tile."""
    _, _, outer, inner = _memory(shape, channels_last)
    size = _tile_size(inner, itemsize, accesses=4, narrow=8)
    width = _fit(inner, size, channels_last)
    height = min(size // width, _power(outer))
    depth = min(size // (height * width), _power(shape[0]))
    programs = -(-shape[0] // depth) * -(-outer // height) * -(-inner // width)
    blocks = tuple(k for k, n in enumerate(sizes) for _ in range(n))
    return Tiles(programs, 1, _arguments(outer, inner, channels_last, depth, height, width), blocks)


def merge_tile(rows: int) -> tuple[int, int]:
    """Return the tile ``[ROWS, COLUMNS]`` of the kernels that merge so many rows.

    Narrow, so that few channels still take several programs; more rows than fit take several steps.
    """
    height = min(_power(rows), MERGED)
    return height, min(64, 2 * MERGED // height)


def _memory(shape: Shape, channels_last: bool) -> tuple[int, int, int, int]:
    """Return channels, length, outer and inner of ``[N, C, *]``."""
    channels, length = shape[1], 1
    for n in shape[2:]:
        length *= n
    return (
        (channels, length, length, channels)
        if channels_last
        else (channels, length, channels, length)
    )


def _tile_size(inner: int, itemsize: int, accesses: int, narrow: int) -> int:
    """Return the elements of a tile: `accesses` of 16 bytes per thread.

    Where `inner` has no factor that would let a thread load 16 bytes, at most `narrow` loads.
    """
    vector = min(16 // itemsize, gcd(inner, 16))
    return _THREADS * min(accesses * 16 // itemsize, narrow * vector)


def _arguments(
    outer: int, inner: int, channels_last: bool, depth: int, height: int, width: int
) -> dict[str, int | bool]:
    # A constant factor of `inner` tells the compiler how far it may vectorise.
    unit = gcd(inner, 16)
    return dict(
        outer=outer, units=inner // unit, UNIT=unit,
        CHANNELS_LAST=channels_last, ROWS=depth, OUTER=height, INNER=width,
    )  # fmt: skip


def _fit(inner: int, most: int, channels_last: bool) -> int:
    """Return the width of a tile: the widest of those that waste little beyond the end.

    Channels-last tiles need not be wide, as they can be the higher; narrow ones share the channels
    of a block out to more programs.
    """
    most = min(most, 128) if channels_last else most
    widths = [min(32 if channels_last else 128, most, _power(inner))]
    while widths[-1] < min(most, _power(inner)):
        widths.append(2 * widths[-1])
    covered = {width: -(-inner // width) * width for width in widths}
    return max(width for width in widths if 8 * covered[width] <= 9 * min(covered.values()))


def _power(n: int) -> int:
    """Return the least power of two that is not less than `n`."""
    return 1 << max(n - 1, 0).bit_length()
