"""Which sample goes where: permutations from numbers all ranks know, and no communication.

A permutation is the order of hashed indices, ``argsort(hash(seed, step, ..., index))``. It takes
no random state and only integers, so every rank and every device gets the same one, and a
compiled graph that is given the step as a tensor gets a new one at every call.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, overload

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
    return _of_one_step(int(key.seed), int(key.step), (kind,), rank, n)[0]


def permutations(
    key: Key, kinds: Sequence[int], rank: int, n: int, device: "torch.device | str" = "cpu"
) -> tuple[Tensor, ...]:
    """Return a permutation ``[n]`` of each kind, in one go."""
    if isinstance(key.seed, Tensor) or isinstance(key.step, Tensor):
        device = torch.device(device)
        orders: Tensor = _permutations_op(key.seed, key.step, list(kinds), rank, n, device)
    else:
        orders = _of_one_step(key.seed, key.step, kinds, rank, n).to(device)
    return orders.unbind()


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
    return _of_one_step(int(seed), int(step), kinds, rank, n).to(device)


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


def _permutations(seed: int, steps: range, kinds: Sequence[int], rank: int, n: int) -> Tensor:
    """Return permutations ``[steps, kinds, n]``."""
    mixed = []
    for step in steps:
        for kind in kinds:
            word = _mix(kind << 24 | rank)
            for number in (seed, step):
                for half in (number & _LOW_32, (number >> 32) & _LOW_32):
                    word = _mix(word ^ half)
            mixed.append(word)
    words = torch.tensor(mixed, device="cpu").view(len(steps), len(kinds), 1)
    # The hash is one-to-one in the index, so there are no ties: one order on every machine.
    return torch.argsort(_mix(_mix(torch.arange(n, device="cpu") ^ words) ^ words), dim=2)


def _of_one_step(seed: int, step: int, kinds: Sequence[int], rank: int, n: int) -> Tensor:
    return _permutations(seed, range(step, step + 1), kinds, rank, n)[0]


@overload
def _mix(x: int) -> int: ...
@overload
def _mix(x: Tensor) -> Tensor: ...
def _mix(x: Number) -> Number:
    """Scramble 32 bits, one to one: the two-multiplication hash of C. Wellons' hash-prospector.

    Both factors have 31 bits, so an int64 holds every product: no overflow, which C++ leaves
    undefined.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW_32
    x = (x ^ (x >> 15)) * 0x735A2D97 & _LOW_32
    return x ^ (x >> 15)


def inverse(order: Tensor) -> Tensor:
    """Return the inverse of permutations ``[..., n]``."""
    return torch.argsort(order)


class Route(NamedTuple):
    """One rank's part in moving samples between ranks.

    Attributes:
        send_order: ``[N]``, this rank's samples: first those that leave, in rank order, then those
            that stay.
        send_splits: how many leave for each rank; 0 for this one.
        place_order: ``[N']``, for each place of the result, which sample lands there, of those that
            arrive, in rank order, and then those that stayed.
        receive_splits: how many arrive from each rank; 0 from this one.
        inverses: of `send_order` and of `place_order`, where they were made with these.
    """

    send_order: Tensor
    send_splits: tuple[int, ...]
    place_order: Tensor
    receive_splits: tuple[int, ...]
    inverses: tuple[Tensor, ...] = ()

    def inverse(self) -> "Route":
        """Return the route that moves every sample back."""
        leaving, placed = self.inverses or (inverse(self.send_order), inverse(self.place_order))
        return Route(
            send_order=placed,
            send_splits=self.receive_splits,
            place_order=leaving,
            receive_splits=self.send_splits,
            inverses=(self.place_order, self.send_order),
        )

    def to(self, device: torch.device) -> "Route":
        """Return the route with its orders on a device."""
        if self.send_order.device == device == self.place_order.device:
            return self
        return self._replace(
            send_order=self.send_order.to(device),
            place_order=self.place_order.to(device),
            inverses=tuple(order.to(device) for order in self.inverses),
        )


def is_stratified(sizes: Sequence[int]) -> bool:
    """Return whether every rank can send as many samples to each: W divides one common N."""
    return len(set(sizes)) == 1 and sizes[0] % len(sizes) == 0


def make_route(
    key: Key, sizes: Sequence[int], rank: int, device: "torch.device | str" = "cpu"
) -> Route:
    """Return `rank`'s part in shuffling batches of these sizes; the sizes stay what they are."""
    if is_stratified(sizes):
        return stratified_route(key, sizes[0], len(sizes), rank, device)
    return uniform_route(key, sizes, rank)


def stratified_route(
    key: Key, n: int, world_size: int, rank: int, device: "torch.device | str" = "cpu"
) -> Route:
    """Return the route on which every rank sends ``n / W`` samples of its choice to every rank."""
    shares = (n // world_size,) * world_size
    splits, stays = to_others(shares, rank), _stays(shares, rank)
    # A first step may be the only one of its seed: a generator's.
    if isinstance(key.seed, int) and isinstance(key.step, int) and key.step and n <= _FEW:
        block, k = divmod(key.step, _AHEAD)
        ahead = _made_ahead(key.seed, block, rank, n, stays)[k]
        # A copy, since a caller could change it.
        send, place, *inverses = ahead.to(device, copy=True).unbind()
        return Route(send, splits, place, splits, tuple(inverses))
    leaving, arrived = permutations(key, (LEAVING, ARRIVED), rank, n, device)
    return Route(_stays_last(leaving, stays), splits, _place(arrived, stays), splits)


# Sixteen steps take two to three times as long as one, and a loop goes on to the next.
_AHEAD, _FEW = 16, 128


@lru_cache(maxsize=16)
def _made_ahead(seed: int, block: int, rank: int, n: int, stays: tuple[int, int]) -> Tensor:
    """Return the orders of some steps' routes, and their inverses: ``[steps, 4, n]``."""
    steps = range(block * _AHEAD, (block + 1) * _AHEAD)
    with torch.inference_mode(False):
        leaving, arrived = _permutations(seed, steps, (LEAVING, ARRIVED), rank, n).unbind(dim=1)
        orders = torch.stack([_stays_last(leaving, stays), _place(arrived, stays)], dim=1)
        return torch.cat([orders, inverse(orders)], dim=1)


def uniform_route(key: Key, sizes: Sequence[int], rank: int) -> Route:
    """Return the route of a uniform permutation of all ranks' samples, batch sizes kept.

    Both ends order the samples of one message by their place at the destination, so that no index
    has to travel with them.
    """
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    mine = slice(int(offsets[rank]), int(offsets[rank + 1]))
    order = permutation(key, ALL_SAMPLES, 0, int(offsets[-1]))  # place to sample, over all ranks
    leaving = inverse(order)[mine]  # the places to which this rank's samples go
    source = _owners(order[mine], offsets)
    sent = _count(_owners(leaving, offsets), len(sizes))
    received = _count(source, len(sizes))
    return Route(
        send_order=_stays_last(torch.argsort(leaving), _stays(sent, rank)),
        send_splits=to_others(sent, rank),
        place_order=_place(inverse(torch.argsort(source, stable=True)), _stays(received, rank)),
        receive_splits=to_others(received, rank),
    )


def to_others(splits: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return splits without what stays on its rank."""
    return (*splits[:rank], 0, *splits[rank + 1 :])


def _stays(splits: tuple[int, ...], rank: int) -> tuple[int, int]:
    """Return where in a message of these splits the samples of the rank itself begin and end."""
    start = sum(splits[:rank])
    return start, start + splits[rank]


def _stays_last(order: Tensor, stays: tuple[int, int]) -> Tensor:
    """Return orders ``[..., n]`` with what stays last."""
    start, end = stays
    parts = order[..., :start], order[..., end:], order[..., start:end]
    return torch.cat(parts, dim=-1)


def _place(order: Tensor, stays: tuple[int, int]) -> Tensor:
    """Return orders ``[..., n]`` of what was received, now that what stays is last of it."""
    start, end = stays
    later = torch.where(order < end, order + (order.shape[-1] - end), order - (end - start))
    return torch.where(order < start, order, later)


def samples_sent_to(rank: int, key: Key, sizes: Sequence[int]) -> Tensor:
    """Return which samples of all ranks, numbered in a row, a shuffle brings to a rank, ``[N]``.

    It says of one rank what `make_route` makes all of them do together.
    """
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    if not is_stratified(sizes):
        order = permutation(key, ALL_SAMPLES, 0, int(offsets[-1]))
        return order[int(offsets[rank]) : int(offsets[rank + 1])]
    n, chunk = sizes[0], sizes[0] // len(sizes)
    arriving = [
        permutation(key, LEAVING, source, n)[rank * chunk : (rank + 1) * chunk] + source * n
        for source in range(len(sizes))
    ]
    return torch.cat(arriving)[permutation(key, ARRIVED, rank, n)]


def _owners(samples: Tensor, offsets: Tensor) -> Tensor:
    """Return the rank of every sample; a rank without samples owns none."""
    return torch.searchsorted(offsets, samples, right=True) - 1


def _count(ranks: Tensor, world_size: int) -> tuple[int, ...]:
    return tuple(torch.bincount(ranks, minlength=world_size).tolist())
