"""Groups of blocks: arithmetic in a graph finds the blocks that a table lists."""

import pytest
import torch

from shuffle_batchnorm.kernels import block_groups
from shuffle_batchnorm.kernels.rows import BlockGroups


@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_arithmetic_is_the_table(
    number: int, members: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches blocks counted the wrong way round, which only a GPU's graph would show."""
    offset = step if members == 1 else 0
    cells = [(i, c) for i in range(number) for c in range(members)]
    groups = BlockGroups(number, tuple((i + offset + step * c) % number for i, c in cells), step)
    rows, blocks = torch.randn(number, 3), torch.randn(number * members, 3)
    tables = block_groups.of_blocks(rows, groups), block_groups.by_group(blocks, groups)
    monkeypatch.setattr(block_groups, "_is_arithmetic", lambda *_: True)
    assert torch.equal(block_groups.of_blocks(rows, groups), tables[0])
    # In another order, of blocks and not of samples.
    got = block_groups.by_group(blocks, groups)
    assert torch.equal(got.sort(dim=1).values, tables[1].sort(dim=1).values)
