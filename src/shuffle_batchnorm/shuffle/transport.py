"""Moving whole samples along a route: packing, the message, and its gradient."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import World

from .permutations import Route, to_others


def move_samples(
    call: str, route: Route, world: World, leaves: Sequence[Tensor], stamp: int | None = None
) -> tuple[Tensor, ...]:
    """Move the samples of tensors ``[N, *]`` along a route, differentiably, to ``[N', *]``.

    Communication: one message that holds all tensors; one backward, with those of them that need
    a gradient. A stamp travels along, 8 bytes with every sample.

    Raises:
        OtherStampError: another rank sent another stamp; all ranks that sent this one raise it.
    """
    if not torch.is_grad_enabled():
        return _move(call, route, world, leaves, stamp)
    moved: tuple[Tensor, ...] = _Move.apply(call, route, world, stamp, *leaves)  # type: ignore[no-untyped-call]
    return moved


def move_nothing(call: str, n: int, width: int, world: World, device: torch.device) -> None:
    """Take part in a stamped message of n samples, `width` bytes each, that this rank has not."""
    splits = to_others((n // world.size,) * world.size, world.rank)
    sent = torch.zeros(sum(splits), width, dtype=torch.uint8, device=device)
    collectives.exchange_samples(sent, splits, splits, world, call)


class OtherStampError(Exception):
    """The ranks did not all send the same stamp: what has arrived is of no use."""


class _Move(torch.autograd.Function):
    """Move samples along a route; the gradient moves back along its inverse."""

    @staticmethod
    def forward(
        ctx: Any, call: str, route: Route, world: World, stamp: int | None, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.route, ctx.world = call, route, world
        moved = _move(call, route, world, leaves, stamp)
        needed = ctx.needs_input_grad[4:]
        # Else a queue's detached features would come back as parts of this step's graph.
        ctx.mark_non_differentiable(
            *(leaf for leaf, need in zip(moved, needed, strict=True) if not need)
        )
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # The ranks have agreed on which leaves need a gradient, so their messages match.
        needed = ctx.needs_input_grad[4:]
        sent = [gradient for gradient, need in zip(gradients, needed, strict=True) if need]
        route = ctx.route.inverse()
        if torch.is_grad_enabled():  # create_graph=True
            moved = move_samples(ctx.call, route, ctx.world, sent)
        else:
            moved = _move(ctx.call, route, ctx.world, sent)
        results = iter(moved)
        return (None, None, None, None, *(next(results) if need else None for need in needed))


def _move(
    call: str, route: Route, world: World, leaves: Sequence[Tensor], stamp: int | None = None
) -> tuple[Tensor, ...]:
    """Move all leaves ``[N, *]`` in one message of bytes, whatever their dtypes."""
    if world.size > 1:
        move = _move_in_graph if torch.compiler.is_compiling() else _move_bytes
        return move(call, route, world, leaves, stamp)
    order = route.send_order[route.place_order]
    return tuple(_in_format(leaf.index_select(0, order), _memory_format(leaf)) for leaf in leaves)


def _move_bytes(
    call: str, route: Route, world: World, leaves: Sequence[Tensor], stamp: int | None
) -> tuple[Tensor, ...]:
    """Move leaves, allocating no more than what is sent and what is received.

    On a CPU the first touch of new memory costs ten times the copy into it. So one of the two
    memories becomes the result, and the other is kept for the next call.
    """
    n, leaving = len(route.send_order), sum(route.send_splits)
    places, width = _places(leaves, stamped=stamp is not None)
    buffer = _take_buffer(world, n * width, leaves[0].device)
    rows = buffer.narrow(0, 0, n * width).view(n, width)
    received = rows.new_empty(len(route.place_order), width)
    sent, incoming = rows[:leaving], received[: sum(route.receive_splits)]

    def pack(samples: Tensor, packed: Tensor) -> None:
        for place, leaf in zip(places, leaves, strict=True):
            if leaf.numel():
                # In the order of a contiguous tensor: that of other ranks' leaves may differ.
                torch.index_select(leaf, 0, samples, out=_part(packed, place, leaf))

    pack(route.send_order[:leaving], sent)
    if stamp is not None:
        sent.view(torch.int64).select(1, -1).fill_(stamp)
    collectives.exchange_samples(
        sent, route.send_splits, route.receive_splits, world, call, incoming,
        meanwhile=lambda: pack(route.send_order[leaving:], received[len(incoming) :]),
    )  # fmt: skip
    if stamp is not None and set(incoming.view(torch.int64).select(1, -1).tolist()) != {stamp}:
        _keep_buffer(world, buffer)
        raise OtherStampError
    if len(buffer) == n * width and _is_contiguous(leaves):
        # Sent memory becomes the result, and what has arrived is kept: one pass.
        moved = [_take_memory(buffer, leaves[0])]
        arrived = _part(received, places[0], leaves[0])
        torch.index_select(arrived, 0, route.place_order, out=moved[0])
        _keep_buffer(world, received.view(-1))
        return tuple(moved)
    torch.index_select(received, 0, route.place_order, out=rows)
    if _is_contiguous(leaves):
        moved = [_take_memory(received, leaves[0])]
    else:
        _free(received)
        moved = [
            torch.empty(
                leaf.shape,
                dtype=leaf.dtype,
                device=leaf.device,
                memory_format=_memory_format(leaf),
            )
            for leaf in leaves
        ]
    for place, leaf in zip(places, moved, strict=True):
        leaf.copy_(_part(rows, place, leaf))
    _keep_buffer(world, buffer)
    return tuple(moved)


def _is_contiguous(leaves: Sequence[Tensor]) -> bool:
    """Return whether the result is one tensor in the order of the message."""
    return len(leaves) == 1 and _memory_format(leaves[0]) == torch.contiguous_format


def _take_memory(memory: Tensor, leaf: Tensor) -> Tensor:
    """Return a new tensor like a leaf in this memory, yet no view: users may change it in place."""
    result = torch.empty(0, dtype=leaf.dtype, device=memory.device)
    return result.set_(memory.untyped_storage()).resize_(leaf.shape)


def _part(rows: Tensor, place: slice, leaf: Tensor) -> Tensor:
    """View a leaf's bytes in each row ``[N, K]`` as a tensor like the leaf, ``[N, *]``."""
    # A view of no bytes as a wider type is refused.
    if not leaf.numel():
        return leaf
    return rows[:, place].view(leaf.dtype).view(len(rows), *leaf.shape[1:])


def stamped_width(leaves: Sequence[Tensor]) -> int:
    """Return how many bytes of a stamped message a sample takes."""
    return _places(leaves, stamped=True)[1]


def _places(leaves: Sequence[Tensor], *, stamped: bool) -> tuple[list[slice], int]:
    """Return where each leaf's bytes are in a sample's, aligned to its dtype; and how many."""
    places, end = [], 0
    for leaf in leaves:
        start = _round_up(end, leaf.dtype.itemsize)
        end = start + leaf.shape[1:].numel() * leaf.dtype.itemsize
        places.append(slice(start, end))
    alignment = max(leaf.dtype.itemsize for leaf in leaves)
    if not stamped:
        return places, _round_up(end, alignment)
    # The last 8 bytes. Samples begin with a cache line where that adds little and is copied faster.
    return places, _round_up(end + 8, 64 if 2**12 <= end <= 2**17 else max(alignment, 8))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


# On a CPU, memory for each group's largest message. Not on a GPU, whose allocator does as much.
_buffers: "WeakKeyDictionary[Any, Tensor]" = WeakKeyDictionary()


def _take_buffer(world: World, size: int, device: torch.device) -> Tensor:
    """Return at least `size` bytes that nobody else uses until they are kept again."""
    buffer = _buffers.pop(world.group, None) if device.type == "cpu" else None
    if buffer is None or len(buffer) < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer


def _keep_buffer(world: World, buffer: Tensor) -> None:
    # What was made in inference mode could not be written to outside of it.
    if buffer.device.type == "cpu" and not buffer.is_inference():
        _buffers[world.group] = buffer


def _move_in_graph(
    call: str, route: Route, world: World, leaves: Sequence[Tensor], _stamp: int | None
) -> tuple[Tensor, ...]:
    """Move leaves by operations that the compiler can trace; nothing is compared there."""
    packed = _pack([leaf.index_select(0, route.send_order).contiguous() for leaf in leaves])
    leaving, staying = packed.tensor_split((sum(route.send_splits),))
    received = torch.cat([
        collectives.exchange_samples(leaving, route.send_splits, route.receive_splits, world, call),
        staying,
    ])  # fmt: skip
    return tuple(
        _unpack(part, leaf, route.place_order)
        for part, leaf in zip(_parts(received, leaves), leaves, strict=True)
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


def _unpack(part: Tensor, leaf: Tensor, order: Tensor) -> Tensor:
    """Return the samples ``[N, *]``, like a leaf's, in received bytes ``[N, K]``, in this order."""
    # Flat, because a view of no bytes per sample as a wider type is refused otherwise.
    moved = part.index_select(0, order).view(-1).view(leaf.dtype).view(leaf.shape)
    if leaf.is_floating_point() or leaf.is_complex():
        # A pass over it, since no result may be a view. It names the leaf because the compiler of
        # torch 2.11 sees no gradient in what has been bytes, and would silently make it zero.
        never = torch.zeros((), dtype=torch.bool, device=leaf.device)
        moved = torch.where(never, leaf, moved)
    else:
        moved = moved.clone()
    return _in_format(moved, _memory_format(leaf))


def _in_format(moved: Tensor, memory_format: torch.memory_format) -> Tensor:
    # Where `contiguous` returns the tensor itself, torch 2.11 compiles a gradient of zeros.
    if moved.is_contiguous(memory_format=memory_format):
        return moved
    return moved.contiguous(memory_format=memory_format)


def _memory_format(leaf: Tensor) -> torch.memory_format:
    if leaf.ndim in (4, 5) and not leaf.is_contiguous():
        last = torch.channels_last if leaf.ndim == 4 else torch.channels_last_3d
        if leaf.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format
