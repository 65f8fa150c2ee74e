"""The imaginary GPU knows what waits for a real one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_sync import never_waits
from imaginary_gpu import Waited, imaginary_gpu

# Each of a tensor [3, 4] on the GPU and one [3] of int64 on the host, and below them on the GPU.
WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "item": lambda x, _: x[0, 0].item(),
    "float": lambda x, _: float(x.sum()),
    "if": lambda x, _: bool((x > 0).any()),
    "list": lambda x, _: x.tolist(),
    "equal": lambda x, _: torch.equal(x, x + 1),
    "to the host": lambda x, _: x.cpu(),
    "to a host tensor": lambda x, _: torch.empty(3, 4).copy_(x),
    "a mask": lambda x, _: x[x > 0],
    "masked_select": lambda x, _: x.masked_select(x > 0),
    "nonzero": lambda x, _: x.nonzero(),
    "repeats": lambda x, order: x.repeat_interleave(order.to(x.device), dim=0),
    "inverse": lambda x, _: torch.linalg.inv(x[:, :3]),
    "a list as index": lambda x, _: x[[0, 2]],
    "host index": lambda x, order: x[order],
    "numbers to the GPU": lambda x, _: torch.tensor([1.0, 2.0], device=x.device),
    "numbers like another's": lambda x, _: x.new_tensor([1.0, 2.0]),
    "pageable to the GPU": lambda x, order: order.to(x.device),
    "pageable into the GPU": lambda x, _: x.copy_(torch.ones(3, 4)),
    "pinned but blocking": lambda x, order: order.pin_memory().to(x.device),
}
GOES_ON: dict[str, Callable[[Tensor, Tensor], object]] = {
    "arithmetic": lambda x, _: (x * 2 + x.mean()).sqrt_(),
    "host number": lambda x, _: x * torch.tensor(2.0),
    "python number": lambda x, _: x[1].fill_(2.0),
    "pinned": lambda x, order: order.pin_memory().to(x.device, non_blocking=True),
    "into the GPU": lambda x, _: x.copy_(torch.ones(3, 4).pin_memory(), non_blocking=True),
    "index": lambda x, _: x[torch.arange(2, device=x.device)],
    "where": lambda x, _: torch.where(x > 0, x, 0),
    "masked_fill": lambda x, _: x.masked_fill_(x > 0, 1.0),
    "sort": lambda x, _: x.argsort(),
    "backward": lambda x, _: x.clone().requires_grad_().pow(2).sum().backward(),
    "same device": lambda x, _: torch.as_tensor(x, device="cuda").to("cuda"),
    "cuda": lambda x, _: x.cuda().is_cuda and not x.is_meta and x.device.type,
}


def _operands() -> tuple[Tensor, Tensor]:
    return torch.ones(3, 4, device="cuda"), torch.arange(3)


@pytest.mark.parametrize("name", WAITS)
def test_what_waits(name: str) -> None:
    with imaginary_gpu() as gpu:
        x, order = _operands()
        with pytest.raises(Waited), gpu.never_waits():
            WAITS[name](x, order)


@pytest.mark.parametrize("name", GOES_ON)
def test_what_goes_on(name: str) -> None:
    with imaginary_gpu() as gpu:
        x, order = _operands()
        with gpu.never_waits():
            GOES_ON[name](x, order)


def test_torch_overlooks_a_copy_from_pageable_memory() -> None:
    """Catches ``non_blocking=True`` without pinned memory, unless it is small and that is asked."""
    with imaginary_gpu() as gpu:
        order, large = torch.arange(3), torch.arange(10_000)
        order.to("cuda"), large.to("cuda")  # where nobody minds
        with gpu.never_waits(), pytest.raises(Waited, match="pageable"):
            order.to("cuda", non_blocking=True)
        with gpu.never_waits(small_copies=True):
            order.to("cuda", non_blocking=True)
            with pytest.raises(Waited, match="pageable"):
                large.to("cuda", non_blocking=True)
            with pytest.raises(Waited, match="pageable"):
                order.to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*WAITS, *GOES_ON])
def test_torch_says_the_same_of_a_gpu(name: str) -> None:
    """Catches an imaginary GPU that is too mild or too strict."""
    x, order = _operands()
    if name in GOES_ON:
        GOES_ON[name](x, order)  # its kernels are loaded
        with never_waits():
            GOES_ON[name](x, order)
        return
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), never_waits():
        WAITS[name](x, order)
    assert torch.cuda.get_sync_debug_mode() == 0
