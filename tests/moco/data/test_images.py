"""Images in memory: one by one, in batches, and in another size."""

import pytest
import torch

from shuffle_batchnorm.moco.data.images import ArrayImages, resized


def test_a_batch_is_its_items() -> None:
    """Catches a batch at once that has other images, or another order, than one by one."""
    images = torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8)
    data = ArrayImages(images, torch.arange(5))
    assert len(data) == 5
    chosen, labels = data.__getitems__([3, 0, 3])
    assert labels.tolist() == [3, 0, 3]
    assert torch.equal(chosen, torch.stack([data[k][0] for k in (3, 0, 3)]))


@pytest.mark.parametrize("side", [4, 8, 16])
def test_another_size_keeps_the_range(side: int) -> None:
    """Catches values that wrap around beyond 255, and a flat image that is flat no more."""
    for value in (0, 200, 255):
        images = torch.full((2, 3, 8, 8), value, dtype=torch.uint8)
        smaller = resized(images, side)
        assert smaller.shape == (2, 3, side, side)
        assert smaller.dtype == torch.uint8
        assert smaller.eq(value).all()
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    assert resized(edge, side)[..., -1].eq(255).all()
