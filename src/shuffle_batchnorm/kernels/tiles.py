"""How the Triton kernels cut their work into programs: plain arithmetic, without Triton.

Memory is dense, ``[N, outer, inner]``: ``[N, L, C]`` if channels-last, else ``[N, C, L]``. A sum
takes ROWS tiles ``[OUTER, INNER]`` in a step, of as many positions if channels-last, or of samples.

Planes that 16 bytes don't divide, 7 x 7 and 14 x 14, say, are a run of memory instead, whose start
is at a multiple of 16 bytes: ``[N, 1, C * L]`` for sums, where a tile is some whole planes and each
lane stays with its channel; ``[N, C * L / V, V]``, V values a thread's access, for the elementwise
kernels, where a channel ends within an access.

Nothing is tuned by timing. The bits of a sum depend on its tiles, and what it is cut into must not
depend on a machine's mood: ranks would differ. What a tile must do can be counted. Memory that
gives 4.3 TB/s and answers after 700 ns, as a guess, has to have 3 MB of loads under way, 23 KiB on
each of 132 multiprocessors. A step has ROWS times 2 KiB of each tensor to load, and starts all or
most of it before the first use; 4 to 10 programs fit a multiprocessor by their registers. That is
40 to 80 KiB in the machine code (``tests/kernels/compile_kernels.py --table``), a quarter less
where lanes beyond the planes are idle. So no step stops to try tiles, whatever its batch size, and
a CUDA graph needs one warm-up call.
"""

from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

Sizes = tuple[int, ...]
Shape = tuple[int, ...]

_THREADS = 128
_ROWS = 4  # tiles that a program loads at once
_STEPS = 4  # loads of ROWS tiles that are worth a program of their own
_UNSPLIT = 8  # as many are not worth a second launch
_FEW = 528  # programs: where they are fewer, two loads are worth one, too
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
    arguments: dict[str, int]
    table: tuple[int, ...]


@lru_cache(maxsize=1024)
def reduction(
    shape: Shape, sizes: Sizes, channels_last: bool, itemsize: int, members: int = 1
) -> Tiles:
    """Return how to sum blocks: a program takes some channels of a block, or a split of them.

    `members` are the blocks that are merged to one.
    """
    most = max(sizes)
    channels, plane = shape[1], prod(shape[2:])
    if channels_last:
        length, outer, inner = 1, plane, channels
    elif _is_run(channels, plane, itemsize):
        length, outer, inner = plane, 1, channels * plane
    else:
        length, outer, inner = 0, channels, plane
    lanes = _tile_size(inner, itemsize, accesses=1, narrow=4)
    if length == 0:
        width = _fit(inner, lanes, False)
        taken = height = min(lanes // width, _power(outer))
        rows, pieces = most, -(-inner // width)
    else:
        room = lanes // _power(length)
        taken = _fit(inner, room, True) if length == 1 else min(room, _power(channels))
        width = taken * _power(length)
        height = min(lanes // width, _power(most * outer))
        rows, pieces = -(-most * outer // height), 1
    depth = min(_ROWS, _power(rows))
    steps = -(-rows // depth) * pieces
    programs = -(-channels // taken) * len(sizes)
    splits = 1
    if steps > _UNSPLIT:
        wanted = max(steps // _STEPS, min(steps // 2, _FEW // programs))
        splits = max(1, min(_PROGRAMS // programs, wanted, MERGED // members))
    starts = [0]
    for n in sizes:
        starts.append(starts[-1] + n)
    arguments = _arguments(outer, inner, length, depth, height, width, CHANNELS=taken)
    return Tiles(programs * splits, splits, arguments, tuple(starts))


@lru_cache(maxsize=1024)
def elementwise(shape: Shape, sizes: Sizes, channels_last: bool, itemsize: int) -> Tiles:
    """Return how to map all values: a program takes one tile."""
    channels, plane = shape[1], prod(shape[2:])
    vector = _vector(channels * plane, itemsize)
    if channels_last:
        length, outer, inner = 1, plane, channels
    elif _vector(plane, itemsize) < vector <= plane:
        length, outer, inner = plane, channels * plane // vector, vector
    else:
        length, outer, inner = 0, channels, plane
    size = _tile_size(inner, itemsize, accesses=4, narrow=8)
    width = _fit(inner, size, channels_last)
    height = min(size // width, _power(outer))
    depth = min(size // (height * width), _power(shape[0]))
    programs = -(-shape[0] // depth) * -(-outer // height) * -(-inner // width)
    blocks = tuple(k for k, n in enumerate(sizes) for _ in range(n))
    return Tiles(programs, 1, _arguments(outer, inner, length, depth, height, width), blocks)


def merge_tile(rows: int) -> tuple[int, int]:
    """Return the tile ``[ROWS, COLUMNS]`` of the kernels that merge so many rows.

    Narrow, so that few channels still take several programs; more rows than fit take several steps.
    """
    height = min(_power(rows), MERGED)
    return height, min(64, 2 * MERGED // height)


def _is_run(channels: int, plane: int, itemsize: int) -> bool:
    """Say whether planes of a sample are summed as one run of memory.

    They are if a tile has room for whole ones, and tiles of the planes themselves would partly lie
    beyond them.
    """
    lanes = _tile_size(channels * plane, itemsize, accesses=1, narrow=4)
    return plane < _power(plane) <= lanes and _fit(plane, lanes, False) > plane


def _vector(inner: int, itemsize: int) -> int:
    """Return the elements that a thread can load at once, at most 16 bytes."""
    return min(16 // itemsize, gcd(inner, 16))


def _tile_size(inner: int, itemsize: int, accesses: int, narrow: int) -> int:
    """Return the elements of a tile: `accesses` of 16 bytes per thread.

    Where `inner` has no factor that would let a thread load 16 bytes, at most `narrow` loads.
    """
    return _THREADS * min(accesses * 16 // itemsize, narrow * _vector(inner, itemsize))


def _arguments(
    outer: int, inner: int, length: int, depth: int, height: int, width: int, **more: int
) -> dict[str, int]:
    # A constant factor of `inner` tells the compiler how far it may vectorise.
    unit = gcd(inner, 16)
    return dict(
        outer=outer, units=inner // unit, UNIT=unit, LENGTH=length, ROWS=depth, OUTER=height,
        INNER=width, **more,
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
