"""Rows in plain torch: groups of blocks, and constants that live as long as what reads them."""

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm.kernels import rows as kernel_rows
from shuffle_batchnorm.kernels.rows import BlockGroups


def test_order_of_groups() -> None:
    """Catches blocks of a group out of their order, which ranks would then add otherwise."""
    groups = BlockGroups(3, (2, 0, 1, 0, 2, 1))
    assert groups.members == 2
    assert groups.order == (1, 3, 2, 5, 0, 4)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2, 2), (1, 1, 0), (1,) * 3], ids=str)
def test_blocks_and_samples(sizes: tuple[int, ...]) -> None:
    """Catches a sample counted in its neighbour, and a compiler's arithmetic that differs."""
    samples = torch.randn(sum(sizes), 3)
    sums = torch.stack([block.sum(dim=0) for block in samples.split(sizes)])
    torch.testing.assert_close(kernel_rows.block_sum(samples, sizes), sums)
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(kernel_rows.per_sample(sums, sizes), sums[owners])
    assert kernel_rows.counts(sizes, 5, sums)[:, 0].tolist() == [5 * n for n in sizes]


def test_what_a_cuda_graph_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches index tensors freed by a full cache, whose memory a replay goes on reading."""

    class OnAGPU(Tensor):
        is_cuda = True

    held = torch.arange(3).as_subclass(OnAGPU)
    monkeypatch.setattr(kernel_rows, "_cached", lambda *_: held)
    monkeypatch.setattr(kernel_rows, "_in_cuda_graphs", held_alive := set[Tensor]())
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)  # noqa: B023
        kernel_rows.constant((0, 1, 2), torch.int64, torch.zeros(1))
        assert held_alive == ({held} if is_capturing else set())
