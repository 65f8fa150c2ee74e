"""The share of common samples, and the families that are fitted."""

import numpy as np
import pytest

from shuffle_batchnorm.moco.study.law import FAMILIES, Family, share


@pytest.mark.parametrize(
    ("n", "blocks"), [(4, 3), (8, 1), (8, 2), (8, 3), (8, 6), (8, 8), (16, 6), (64, 8)]
)
def test_the_share_is_that_of_the_blocks_of_regroup(n: int, blocks: int) -> None:
    """Catches blocks that are cut otherwise than torch.tensor_split cuts them."""
    sizes = [len(block) for block in np.array_split(np.arange(n), blocks)]
    common = [size - 1 for size in sizes for _ in range(size)]
    assert share(n, blocks) == pytest.approx(np.mean(common) / (n - 1))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_fall_with_blocks_and_size(family: Family) -> None:
    n, blocks = np.array([8, 8, 8, 32]), np.array([1, 2, 4, 1])
    leak = family.leak(n, blocks, *family.start)
    assert len(family.parameters) == len(family.start)
    assert leak[0] > leak[1] > leak[2] > 0
    assert leak[0] > leak[3] > 0


@pytest.mark.parametrize("family", FAMILIES[:3], ids=lambda family: family.name)
def test_nothing_in_common_leaks_nothing(family: Family) -> None:
    """Catches a power of zero that is 1, or infinite where a fit tries a negative one."""
    for sign in (1, -1):
        values = [sign * v if name == "β" else v for name, v in
                  zip(family.parameters, family.start, strict=True)]  # fmt: skip
        assert family.leak(8, 8, *values) == 0
