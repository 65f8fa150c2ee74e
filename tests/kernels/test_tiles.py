"""How work is cut for the Triton kernels: enough programs, tiles that compile, few variants."""

import pytest

from shuffle_batchnorm.kernels.tiles import elementwise, merge_tile, reduction

# The batch norms of ResNet-50: channels and side.
RESNET = [
    (64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28), (256, 14),
    (512, 14), (1024, 14), (512, 7), (2048, 7),
]  # fmt: skip
LAYOUTS = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)
BYTES = pytest.mark.parametrize("itemsize", [2, 4, 8])


@pytest.mark.parametrize("layer", RESNET, ids=str)
@pytest.mark.parametrize("blocks", [1, 8, 64])
@LAYOUTS
@BYTES
def test_a_gpu_is_busy_at_every_layer(
    layer: tuple[int, int], blocks: int, channels_last: bool, itemsize: int
) -> None:
    """Catches programs too few for a GPU's 132 multiprocessors, or too small to be worth one."""
    channels, side = layer
    shape = (256, channels, side, side)
    sizes = (256 // blocks,) * blocks
    megabytes = 256 * channels * side**2 * itemsize / 2**20
    tiles = reduction(shape, sizes, channels_last, itemsize)
    assert tiles.programs >= min(1000, 16 * megabytes)
    assert megabytes / tiles.programs >= 1 / 2**9  # 2 KiB
    assert tiles.programs % (blocks * tiles.splits) == 0


@pytest.mark.parametrize("channels", [1, 3, 24, 64, 65, 130, 257, 2048])
@pytest.mark.parametrize("length", [1, 2, 49, 196, 1030, 12544])
@LAYOUTS
@BYTES
def test_tiles_compile_and_cover(
    channels: int, length: int, channels_last: bool, itemsize: int
) -> None:
    """Catches a tile that is no power of two, wider than a program can hold, or mostly beyond."""
    for n, sizes in ((1, (1,)), (96, (96,)), (97, (40, 0, 57)), (4096, (1,) * 4096)):
        for cut in (reduction, elementwise):
            tiles = cut((n, channels, length), sizes, channels_last, itemsize)
            arguments = tiles.arguments
            rows, outer, inner = (arguments[name] for name in ("ROWS", "OUTER", "INNER"))
            for size in (rows, outer, inner):
                assert size & (size - 1) == 0
            assert 1 <= rows * outer * inner * itemsize <= 8192
            width = arguments["units"] * arguments["UNIT"]
            assert arguments["outer"] * width == channels * length
            assert -(-width // inner) * inner < 2 * width
            height, columns = merge_tile(tiles.splits)
            assert tiles.splits <= height <= 2048
            assert height * columns <= 2048


@pytest.mark.parametrize("length", [3, 49, 196, 225])
@pytest.mark.parametrize("channels", [1, 3, 64, 2048])
@BYTES
def test_whole_planes_are_summed_as_one_run(channels: int, length: int, itemsize: int) -> None:
    """Catches a channel that is cut, or whose lanes a gather would find beyond the tile."""
    arguments = reduction((96, channels, length), (96,), False, itemsize).arguments
    if arguments["LENGTH"] == 0:
        assert channels * length % 2 == 1 or length > 200
        return
    planes, inner = arguments["CHANNELS"], arguments["INNER"]
    assert arguments["LENGTH"] == length
    assert planes & (planes - 1) == 0
    assert inner % planes == 0
    assert length <= inner // planes < 2 * length


@LAYOUTS
def test_batches_of_other_sizes_compile_nothing_new(channels_last: bool) -> None:
    """Catches a compilation at the last batch of an epoch."""
    for cut in (reduction, elementwise):
        for shape in ((64, 56, 56), (2048, 7, 7)):
            kinds = {
                tuple(cut((n, *shape), (n // 8,) * 8, channels_last, 4).arguments.items())
                for n in (256, 248, 96, 64)
            }
            assert len(kinds) == 1


def test_more_blocks_than_a_grid_has_rows() -> None:
    """Catches a grid whose other axes end at 65535 (pytorch#16998): there is one axis."""
    tiles = reduction((131_072, 3), (1,) * 131_072, True, 4)
    assert tiles.programs == 131_072
    assert tiles.splits == 1
