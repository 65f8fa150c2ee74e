"""Which sample goes where: permutations from numbers all ranks know, and no communication.

A permutation is the order of hashed indices, ``argsort(hash(seed, step, ..., index))``. It takes
no random state and only integers, so every rank and every device gets the same one, and a
compiled graph that is given the step as a tensor gets a new one at every call.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm.recomputation import is_recomputation

Number = int | Tensor

# A rank's samples before they leave, what it has received, all samples of all ranks, a data set.
LEAVING, ARRIVED, ALL_SAMPLES, DATA_SET = range(4)

REPEATED = (
    "batch_shuffle: an activation checkpoint, or a compiler that saves memory, repeats this "
    "shuffle in the backward pass, with another permutation; shuffle outside the checkpoint, or "
    "pass plan="
)
_LOW_32 = 0xFFFFFFFF


class Key(NamedTuple):
    """What all ranks know of one shuffle; numbers, or 0-dim tensors in a compiled graph."""

    seed: Number
    step: Number


def permutation(key: Key, kind: int, rank: int, n: int) -> Tensor:
    """Return a permutation ``[n]`` that only depends on the key, its kind and a rank."""
    return _permutations(int(key.seed), int(key.step), (kind,), rank, n)[0]


def _permutations(seed: int, step: int, kinds: Sequence[int], rank: int, n: int) -> Tensor:
    """Return a permutation of each kind, ``[kinds, n]``."""
    mixed = []
    for kind in kinds:
        word = _mix(kind << 24 | rank)
        for number in (seed, step):
            for half in (number & _LOW_32, (number >> 32) & _LOW_32):
                word = _mix(word ^ half)
        mixed.append(word)
    words = torch.tensor(mixed, device="cpu").view(len(kinds), 1)
    # The hash is one-to-one in the index, so there are no ties: one order on every machine.
    return torch.argsort(_mix(_mix(torch.arange(n, device="cpu") ^ words) ^ words), dim=1)


# Opaque to the compiler, which otherwise writes out every use of every intermediate number: the
# hash uses each twice, many times over.
@torch.library.custom_op("shuffle_batchnorm::permutations", mutates_args=())
def _permutations_op(
    seed: Tensor, step: Tensor, kinds: list[int], rank: int, n: int, device: torch.device
) -> Tensor:
    # The step may have moved on since the forward pass. Here and not where the compiler traces,
    # because a checkpoint can be around what has been compiled.
    if is_recomputation():
        raise RuntimeError(REPEATED)
    return send_up(_permutations(int(seed), int(step), kinds, rank, n), device)


@_permutations_op.register_fake
def _(
    seed: Tensor,  # noqa: ARG001
    step: Tensor,  # noqa: ARG001
    kinds: list[int],
    rank: int,  # noqa: ARG001
    n: int,
    device: torch.device,
) -> Tensor:
    return torch.empty(len(kinds), n, dtype=torch.int64, device=device)


def _mix(x: Any) -> Any:
    """Scramble 32 bits of an int or a tensor, one to one.

    It is the two-multiplication hash of C. Wellons' hash-prospector.

    Both factors have 31 bits, so an int64 holds every product: no overflow, which C++ leaves
    undefined. A tensor is changed in place.
    """
    x ^= x >> 16
    x *= 0x21F0AAAD
    x &= _LOW_32
    x ^= x >> 15
    x *= 0x735A2D97
    x &= _LOW_32
    x ^= x >> 15
    return x


def send_up(numbers: Tensor, device: torch.device) -> Tensor:
    """Return what was made on the CPU on another device, without waiting for the copy."""
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def inverse(order: Tensor) -> Tensor:
    """Return the inverse of a permutation ``[n]``."""
    return torch.argsort(order)


class Route(NamedTuple):
    """One rank's part in moving samples between ranks.

    Attributes:
        send_order: ``[N]``, this rank's samples in the order of the ranks they go to.
        send_splits: how many go to each rank, this one among them.
        place_order: ``[N]``, for each position of the result, which of the samples received lands
            there; they arrive in the order of the ranks they come from.
        receive_splits: how many come from each rank.
    """

    send_order: Tensor
    send_splits: tuple[int, ...]
    place_order: Tensor
    receive_splits: tuple[int, ...]

    def inverse(self) -> "Route":
        """Return the route that moves every sample back."""
        return Route(
            send_order=inverse(self.place_order),
            send_splits=self.receive_splits,
            place_order=inverse(self.send_order),
            receive_splits=self.send_splits,
        )

    def to(self, device: torch.device) -> "Route":
        """Return the route with its orders on a device."""
        if self.send_order.device == device == self.place_order.device:
            return self
        return self._replace(
            send_order=send_up(self.send_order, device),
            place_order=send_up(self.place_order, device),
        )


def is_stratified(sizes: Sequence[int]) -> bool:
    """Return whether every rank can send as many samples to each: W divides one common N."""
    return len(set(sizes)) == 1 and sizes[0] % len(sizes) == 0


def make_route(key: Key, sizes: Sequence[int], rank: int) -> Route:
    """Return `rank`'s part in shuffling batches of these sizes; the sizes stay what they are."""
    if not is_stratified(sizes):
        return _uniform_route(key, sizes, rank)
    shares = (sizes[0] // len(sizes),) * len(sizes)
    orders = _permutations(int(key.seed), int(key.step), (LEAVING, ARRIVED), rank, sizes[0])
    return Route(orders[0], shares, orders[1], shares)


def make_route_in_graph(key: Key, sizes: Sequence[int], rank: int, device: torch.device) -> Route:
    """Return the same for a key of tensors, in a compiled graph; W divides one common N."""
    shares = (sizes[0] // len(sizes),) * len(sizes)
    orders: Tensor = _permutations_op(*key, [LEAVING, ARRIVED], rank, sizes[0], device)
    return Route(orders[0], shares, orders[1], shares)


def _uniform_route(key: Key, sizes: Sequence[int], rank: int) -> Route:
    """Return the route of a uniform permutation of all ranks' samples.

    Both ends order the samples of one message by their position at the destination, so that no
    index has to travel with them.
    """
    offsets = torch.tensor([0, *sizes], device="cpu").cumsum(0)
    mine = slice(int(offsets[rank]), int(offsets[rank + 1]))
    order = permutation(key, ALL_SAMPLES, 0, int(offsets[-1]))  # position to sample, on all ranks
    leaving = inverse(order)[mine]  # the positions to which this rank's samples go
    source = _owners(order[mine], offsets)
    return Route(
        send_order=torch.argsort(leaving),
        send_splits=_count(_owners(leaving, offsets), len(sizes)),
        place_order=inverse(torch.argsort(source, stable=True)),
        receive_splits=_count(source, len(sizes)),
    )


def samples_sent_to(rank: int, key: Key, sizes: Sequence[int]) -> Tensor:
    """Return which samples of all ranks, numbered in a row, a shuffle brings to a rank, ``[N]``.

    It says of one rank what `make_route` makes all of them do together.
    """
    offsets = torch.tensor([0, *sizes], device="cpu").cumsum(0)
    if not is_stratified(sizes):
        order = permutation(key, ALL_SAMPLES, 0, int(offsets[-1]))
        return order[int(offsets[rank]) : int(offsets[rank + 1])]
    n, share = sizes[0], sizes[0] // len(sizes)
    arriving = [
        permutation(key, LEAVING, source, n)[rank * share : (rank + 1) * share] + source * n
        for source in range(len(sizes))
    ]
    return torch.cat(arriving)[permutation(key, ARRIVED, rank, n)]


def _owners(samples: Tensor, offsets: Tensor) -> Tensor:
    """Return the rank of every sample; a rank without samples owns none."""
    return torch.searchsorted(offsets, samples, right=True) - 1


def _count(ranks: Tensor, world_size: int) -> tuple[int, ...]:
    return tuple(torch.bincount(ranks, minlength=world_size).tolist())
