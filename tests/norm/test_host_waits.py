"""No step of a layer waits for the GPU, whatever its options, in any number of ranks."""

from typing import Any

import pytest
import torch
from torch import nn

from imaginary_gpu import GPUS, RANKS, gpu
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    record_statistics,
    shuffle_batch_norm,
    shuffle_offset,
)

MODES = pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])


@GPUS
@MODES
def test_a_layer(mode: str, ranks: int) -> None:
    """Catches an .item(), and an index tensor that is sent up at every step."""
    _check(mode, ranks, groups=4)


@RANKS
@MODES
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False}],
    ids=str,
)
def test_any_option(mode: str, options: dict[str, Any], ranks: int) -> None:
    """Catches a momentum that follows from a count, and a check of what isn't there."""
    _check(mode, ranks, **options)


def _check(mode: str, ranks: int, **options: Any) -> None:
    with gpu(ranks) as never_waits:
        layer = ShuffleBatchNorm(5, mode=mode, device="cuda", **options)
        x = torch.randn(20, 5, 7, 6, device="cuda", requires_grad=True)
        layer(x).sum().backward()
        with never_waits():
            layer(x).sum().backward()


@RANKS
@MODES
@pytest.mark.parametrize("shape", [(21, 5), (22, 5, 7, 6), (8, 5, 3)], ids=str)
def test_any_batch(mode: str, shape: tuple[int, ...], ranks: int) -> None:
    """Catches sizes of blocks that are not equal, channels_last, and another dtype than the sums'.

    No new shape waits at its second step, even after others.
    """
    groups = 1 if shape[0] == 21 else 2
    with gpu(ranks) as never_waits:
        layer = ShuffleBatchNorm(5, mode=mode, groups=groups, device="cuda")
        xs = [torch.randn(n, *shape[1:], device="cuda") for n in (shape[0], 40)]
        xs = [x.movedim(1, -1).contiguous().movedim(-1, 1).bfloat16().requires_grad_() for x in xs]
        for x in xs:
            layer(x).sum().backward()
        with never_waits():
            for x in xs:
                layer(x).sum().backward()


@GPUS
def test_what_is_called_around_a_layer(ranks: int) -> None:
    """Catches a number that a context, a recording or the function asks for."""
    with gpu(ranks) as never_waits:
        layers = (ShuffleBatchNorm(5, mode="regroup", groups=4, device="cuda") for _ in range(2))
        model = nn.Sequential(*layers)
        x = torch.randn(20, 5, 7, device="cuda", requires_grad=True)
        mean, var = torch.zeros(5, device="cuda"), torch.ones(5, device="cuda")

        def step() -> None:
            with shuffle_offset(model, 3), record_statistics(model):
                y = model(x)
            shuffle_batch_norm(y, mean, var, training=True, groups=2).sum().backward()

        step()
        with never_waits():
            step()
