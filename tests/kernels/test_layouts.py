"""Which of the two layouts a tensor has, or is copied to."""

import pytest
import torch

from shuffle_batchnorm.kernels.layouts import as_layout, layout

LAST2D = torch.channels_last
CASES = {
    "contiguous": (torch.randn(2, 3, 4, 5), False, True),
    "channels_last": (torch.randn(2, 3, 4, 5).contiguous(memory_format=LAST2D), True, True),
    "transposed, which no memory format names": (torch.randn(2, 5, 3).mT, True, True),
    "L=1": (torch.randn(2, 3), True, True),
    "C=1": (torch.randn(2, 1, 4, 5).contiguous(memory_format=LAST2D), False, True),
    "with gaps": (torch.randn(2, 3, 4, 5)[..., ::2], False, False),
    "channels_last with gaps": (torch.randn(4, 5, 6, 2).permute(0, 3, 1, 2)[::2], True, False),
    "neither": (torch.randn(4, 5, 3, 2).permute(3, 2, 1, 0), False, False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layout(case: tuple[torch.Tensor, bool, bool]) -> None:
    """Catches a layout mistaken for the other, and a copy of what could be read as it is."""
    x, channels_last, same = case
    found, is_last = layout(x)
    assert is_last == channels_last
    assert (found is x) == same
    assert torch.equal(found, x)
    memory = found.movedim(1, -1) if channels_last else found
    assert memory.is_contiguous()
    for dy in (x, torch.randn(x.shape), torch.randn(1).expand(x.shape)):
        gradient = as_layout(dy, channels_last)
        assert torch.equal(gradient, dy)
        assert gradient.stride() == torch.empty_like(found).stride() or 1 in x.shape
