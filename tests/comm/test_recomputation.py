"""Whether a forward is run again inside a backward pass: by a checkpoint, reentrant or not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shuffle_batchnorm.comm.recomputation import is_recomputation


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_repetition_is_told_from_the_first_forward(use_reentrant: bool) -> None:
    """Catches running statistics that move twice, or never."""
    seen: list[bool] = []

    def forward(x: Tensor) -> Any:
        seen.append(is_recomputation())
        return x.sin().cos()  # saves what has to be computed again

    x = torch.randn(3, requires_grad=True)
    checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True]
    assert not is_recomputation()
