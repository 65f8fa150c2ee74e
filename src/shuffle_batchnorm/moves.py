"""Moving whole samples along a route: packing, the message, and its gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import exchange
from .exchange import World
from .permutations import Route


def move_samples(
    call: str, route: Route, world: World, leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Move the samples of tensors ``[N, *]`` along a route, differentiably, to ``[N', *]``.

    Communication: one message that holds all tensors; one backward, with those of them that need
    a gradient.
    """
    moved: tuple[Tensor, ...] = _Move.apply(call, route, world, *leaves)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    """Move samples along a route; the gradient moves back along its inverse."""

    @staticmethod
    def forward(
        ctx: Any, call: str, route: Route, world: World, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.route, ctx.world = call, route, world
        moved = _move(call, route, world, leaves)
        ctx.mark_non_differentiable(
            *(leaf for leaf in moved if not (leaf.is_floating_point() or leaf.is_complex()))
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
            moved = _move(ctx.call, route, ctx.world, sent)
        results = iter(moved)
        return (None, None, None, *(next(results) if need else None for need in needed))


def _move(call: str, route: Route, world: World, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Move all leaves ``[N, *]`` in one message of bytes, whatever their dtypes."""
    if world.size == 1:
        order = route.send_order[route.place_order]
        moved = [leaf.index_select(0, order) for leaf in leaves]
    else:
        leaving = [leaf.index_select(0, route.send_order).contiguous() for leaf in leaves]
        packed = _pack(leaving)
        received = exchange.exchange_samples(
            packed, route.send_splits, route.receive_splits, world, call
        )
        if torch.compiler.is_compiling():
            moved = _unpack(received, leaves, route.place_order)
        else:
            if len(leaves) > 1:
                _free(packed)
            # N stays, so the samples fit where those that left were: on a CPU, new memory costs as
            # much as the copy into it. And a result must not be a view, which autograd would not
            # let its user change in place.
            moved = leaving
            for part, leaf in zip(_parts(received, leaves), moved, strict=True):
                torch.index_select(part, 0, route.place_order, out=_as_bytes(leaf))
        del packed, received
    return tuple(
        new.contiguous(memory_format=_memory_format(old))
        for new, old in zip(moved, leaves, strict=True)
    )


def _pack(leaves: Sequence[Tensor]) -> Tensor:
    """Return the bytes of all leaves, ``[N, K]``."""
    rows = [_as_bytes(leaf) for leaf in leaves]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _as_bytes(leaf: Tensor) -> Tensor:
    return leaf.view(leaf.shape[0], leaf.shape[1:].numel()).view(torch.uint8)


def _free(sent: Tensor) -> None:
    """Give back the memory of what was sent: a thread of gloo's may hold on to it for a while."""
    if sent.device.type == "cpu":
        sent.untyped_storage().resize_(0)


def _parts(received: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return each leaf's bytes in those received."""
    widths = [leaf.shape[1:].numel() * leaf.dtype.itemsize for leaf in leaves]
    parts: tuple[Tensor, ...] = received.split(widths, dim=1)
    return parts


def _unpack(received: Tensor, leaves: Sequence[Tensor], order: Tensor) -> list[Tensor]:
    """Return the leaves ``[N, *]`` in the received bytes ``[N, K]``, in this order."""
    return [
        # Flat, because a view of no bytes per sample as a wider type is refused otherwise. A copy,
        # since no result may be a view; the compiler makes one pass of it.
        part.index_select(0, order).view(-1).view(leaf.dtype).view(leaf.shape).clone()
        for part, leaf in zip(_parts(received, leaves), leaves, strict=True)
    ]


def _memory_format(leaf: Tensor) -> torch.memory_format:
    if leaf.ndim in (4, 5) and not leaf.is_contiguous():
        last = torch.channels_last if leaf.ndim == 4 else torch.channels_last_3d
        if leaf.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format
