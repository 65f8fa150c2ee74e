"""Forward and backward of one process in plain torch, against autograd by the definition."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.kernel_cases import GROUPED, randn
from shuffle_batchnorm.kernels import cpu, reference
from shuffle_batchnorm.kernels.local import Local, prepare
from shuffle_batchnorm.kernels.rows import BlockGroups
from shuffle_batchnorm.kernels.select import Kernels

EPS = 1e-3
MODULES: list[Kernels] = [reference, cpu]


def _by_definition(
    x: Tensor, weight: Tensor, bias: Tensor, sizes: tuple[int, ...], groups: BlockGroups
) -> Tensor:
    """Normalise each block with the group after its own."""
    blocks = x.split(sizes)
    done = []
    for block, owner in zip(blocks, groups.owners, strict=True):
        used = (owner + 1) % groups.number
        members = [b for b, o in zip(blocks, groups.owners, strict=True) if o == used]
        values = torch.cat(members).movedim(1, 0).flatten(1)
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, var = values.mean(dim=1), values.var(dim=1, correction=0)
        xhat = (block - mean.view(shape)) / (var + EPS).sqrt().view(shape)
        done.append(xhat * weight.view(shape) + bias.view(shape))
    return torch.cat(done)


@pytest.mark.parametrize("kernels", MODULES, ids=["reference", "cpu"])
@GROUPED
def test_forward_and_backward(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    groups: BlockGroups,
    channels_last: bool,
    kernels: Kernels,
) -> None:
    """Catches a gradient that forgets the statistics, or gives them to another group."""
    x = randn(*shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    weight, bias = torch.randn(2, shape[1], dtype=x.dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    want = _by_definition(leaves[0], leaves[1], leaves[2], sizes, groups)
    dy = torch.randn_like(want)
    grads = torch.autograd.grad(want, leaves, dy)
    users = BlockGroups(groups.number, tuple((k + 1) % groups.number for k in groups.owners))
    local = Local(kernels, sizes, groups, users, x[:, 0].numel() // groups.number, EPS)
    rows, std = local.statistics(x, weight, None)
    y, rows = local.forward(x, weight, bias, rows, None)
    got = local.gradients(dy, x, weight, bias.dtype, rows, True)
    torch.testing.assert_close(y, want.detach(), rtol=1e-10, atol=1e-10)
    for gradient, truth in zip(got, grads, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-9)
    assert local.gradients(dy, x, weight, bias.dtype, rows, False)[0] is None
    mean, deviation = local.moments(x, rows, std)
    assert mean.shape == deviation.shape == (groups.number, shape[1])


class _Subclass(Tensor):
    pass


def test_kernels_of_their_own_take_plain_memory_alone() -> None:
    """Catches parameters with gaps, on other devices, or without memory, which a kernel reads."""
    own: Any = SimpleNamespace(TritonLocal=lambda *_: "own")
    arguments = own, torch.ones(4, 3), EPS, (2, 2), None, None, 2
    dense, gaps = torch.ones(3), torch.ones(6)[::2]
    assert prepare(*arguments, (dense, None)) == "own"
    for other in (gaps, dense.as_subclass(_Subclass), dense.to("meta")):
        assert isinstance(prepare(*arguments, (dense, other)), Local)
    assert isinstance(prepare(reference, *arguments[1:], (dense, None)), Local)
