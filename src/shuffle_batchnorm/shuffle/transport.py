"""Moving whole samples along a route: packing, one message, and its gradient.

Eager and compiled calls run the same operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import World

from .permutations import Route


def move_samples(
    call: str, route: Route, world: World, leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Move the samples of tensors ``[N, *]`` along a route, differentiably.

    Communication: one message that holds all tensors; one backward, with those of them that need
    a gradient.
    """
    route = route.to(leaves[0].device)
    if not torch.is_grad_enabled():
        return _move(call, f"moves samples in {call}", route, world, leaves)
    moved: tuple[Tensor, ...] = _Move.apply(call, route, world, *leaves)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    """Move samples along a route; the gradient moves back along its inverse."""

    @staticmethod
    def forward(
        ctx: Any, call: str, route: Route, world: World, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.route, ctx.world = call, route, world
        moved = _move(call, f"moves samples in {call}", route, world, leaves)
        needed = ctx.needs_input_grad[3:]
        # Else a queue's detached features would come back as parts of this step's graph.
        ctx.mark_non_differentiable(
            *[leaf for leaf, need in zip(moved, needed, strict=True) if not need]
        )
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # The ranks have agreed on which leaves need a gradient, so their messages match.
        needed = ctx.needs_input_grad[3:]
        sent = [gradient for gradient, need in zip(gradients, needed, strict=True) if need]
        route = ctx.route.inverse()
        if torch.is_grad_enabled():  # create_graph=True
            moved = move_samples(ctx.call, route, ctx.world, sent)
        else:
            doing = f"moves gradients back through {ctx.call}"
            moved = _move(ctx.call, doing, route, ctx.world, sent)
        results = iter(moved)
        return (None, None, None, *[next(results) if need else None for need in needed])


def _move(
    call: str, doing: str, route: Route, world: World, leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Move all leaves ``[N, *]`` in one message of bytes, whatever their dtypes."""
    if world.size == 1:
        order = route.send_order[route.place_order]
        return tuple([_select(leaf, order, leaf) for leaf in leaves])
    sent = _pack(leaves, route.send_order)
    received = collectives.all_to_all(
        sent, route.send_splits, route.receive_splits, world, call, doing
    )
    if sent.device.type == "cpu" and not torch.compiler.is_compiling():
        sent.untyped_storage().resize_(0)  # a thread of gloo's may hold on to it for a while
    parts = zip(_unpack(received, leaves), leaves, strict=True)
    return tuple([_select(part, route.place_order, leaf) for part, leaf in parts])


def _pack(leaves: Sequence[Tensor], order: Tensor) -> Tensor:
    """Return the bytes of samples of all leaves, ``[N, K]``, those of each sample in a row.

    They are in the order of contiguous tensors: other ranks' leaves may be in another one.
    """
    widths = _widths(leaves)
    if torch.compiler.is_compiling():  # the compiler can't write to a part as to another dtype
        parts = []
        for leaf, width in zip(leaves, widths, strict=True):
            chosen = leaf.index_select(0, order).contiguous()
            flat = chosen.view(leaf.shape[0], leaf.shape[1:].numel()).view(torch.uint8)
            parts.append(F.pad(flat, (0, width - flat.shape[1])))
        return torch.cat(parts, dim=1)
    rows = leaves[0].new_empty(len(order), sum(widths), dtype=torch.uint8)
    for leaf, part in zip(leaves, _unpack(rows, leaves), strict=True):
        if leaf.numel():
            torch.index_select(leaf, 0, order, out=part)
    return rows


def _unpack(rows: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return a view of each leaf's bytes in rows ``[N, K]``, as a tensor like the leaf."""
    parts, start = [], 0
    for leaf, width in zip(leaves, _widths(leaves), strict=True):
        part = leaf  # a view of no bytes as a wider type is refused
        if leaf.numel():
            end = start + leaf.shape[1:].numel() * leaf.dtype.itemsize
            part = rows[:, start:end].view(leaf.dtype).view(leaf.shape)
        parts.append(part)
        start += width
    return parts


def _widths(leaves: Sequence[Tensor]) -> list[int]:
    """Return the bytes of each leaf in a row, so that every leaf begins at a multiple of its own.

    That is: at a multiple of its dtype's size.
    """
    step = max([leaf.dtype.itemsize for leaf in leaves])
    sizes = [leaf.shape[1:].numel() * leaf.dtype.itemsize for leaf in leaves]
    return [-(-size // step) * step for size in sizes]


def _select(samples: Tensor, order: Tensor, leaf: Tensor) -> Tensor:
    """Return samples in an order, in new memory: channels_last if the leaf is, else contiguous."""
    wanted = torch.contiguous_format
    if leaf.ndim in (4, 5) and not leaf.is_contiguous():
        last = torch.channels_last if leaf.ndim == 4 else torch.channels_last_3d
        wanted = last if leaf.is_contiguous(memory_format=last) else wanted
    if not torch.compiler.is_compiling():
        out = torch.empty_like(leaf, memory_format=wanted)
        return torch.index_select(samples, 0, order, out=out)
    moved = samples.index_select(0, order)
    if leaf.is_floating_point() or leaf.is_complex():
        # The compiler of torch 2.11 sees no gradient in what has been bytes, and makes it zero.
        never = torch.zeros((), dtype=torch.bool, device=leaf.device)
        moved = torch.where(never, leaf, moved)
    # Where `contiguous` returns the tensor itself, torch 2.11 compiles a gradient of zeros.
    if moved.is_contiguous(memory_format=wanted):
        return moved
    return moved.contiguous(memory_format=wanted)
