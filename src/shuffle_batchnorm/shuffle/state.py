"""What the ranks settle before samples move: one small header, and the seed behind the orders."""

import hashlib
import secrets
import weakref
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import (
    ProcessGroupLike,
    World,
    check_process_group,
    default_device,
    find_world,
    resolve,
)

from .permutations import Key

_PART = collectives.ANSWER_BYTES // 4  # characters: each is 4 bytes at most
NEW_SEED, STATE, GENERATOR, PLAN = "a new seed", "the group's state", "a generator", "a plan"


class Terms(NamedTuple):
    """What all ranks must have in common when they move samples; the names are for the error."""

    call: str
    order: str  # where the permutation comes from
    tree: str
    leaves: str
    needs_gradient: str
    seed: int
    step: int


def agree(
    terms: Terms, n: int, error: Exception | None, world: World, device: torch.device
) -> tuple[tuple[int, ...], int]:
    """Check that all ranks, two or more, call alike; return their batch sizes and rank 0's seed.

    Communication: 72 bytes from every rank to every rank; before an error all_gathers of 2 KiB,
    until a difference has been found.

    Raises:
        Exception: `error` on the rank that has one; RuntimeError that quotes it on its peers;
            ValueError on all ranks if they disagree.
    """
    header = [int(error is None), n, *map(as_number, terms)]
    headers = collectives.gather_numbers(header, device, world, terms.call)
    name, other = _first_difference(headers)
    if all(ok for ok, *_ in headers) and not name:
        return tuple(header[1] for header in headers), headers[0][2 + Terms._fields.index("seed")]
    text = str(error) if error is not None else str(getattr(terms, name, ""))
    texts = collectives.gather_texts(text, device, world, terms.call)
    if error is not None:
        raise error
    for rank, (ok, *_) in enumerate(headers):
        if not ok:
            raise RuntimeError(f"{terms.call}: rank {rank} rejected its batch: {texts[rank]}")
    start = 0
    while texts[0] and texts[0] == texts[other]:  # long, and alike so far
        start += _PART
        texts = collectives.gather_texts(text[start : start + _PART], device, world, terms.call)
    before = "... " if start else ""
    raise ValueError(
        f"{terms.call}: ranks disagree on {name}: {before}{texts[0]} on rank 0, "
        f"{before}{texts[other]} on rank {other}"
    )


def as_number(value: object) -> int:
    """Return an int64 that is the same for the same term in every process."""
    if isinstance(value, int):
        return value
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=7).digest())


def stamp_of(terms: Terms) -> int:
    """Return an int64 that is the same for the same terms, and another for the next step's."""
    *texts, seed, step = terms
    # By odd factors: steps, and calls with other texts, have numbers far from each other.
    mixed = _number_of_texts(tuple(texts)) + seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03
    return mixed & 0x7FFFFFFFFFFFFFFF


@lru_cache(maxsize=256)
def _number_of_texts(texts: tuple[str, ...]) -> int:
    return as_number(texts)


def _first_difference(headers: list[list[int]]) -> tuple[str, int]:
    """Return the first term on which a rank differs from rank 0, and that rank; or an empty one."""
    new_seed = as_number(NEW_SEED)
    for k, name in enumerate(Terms._fields, start=2):
        if name == "seed" and headers[0][2 + Terms._fields.index("order")] == new_seed:
            continue  # every rank has proposed one; rank 0's is taken
        for rank, header in enumerate(headers):
            if header[k] != headers[0][k]:
                return name, rank
    return "", 0


# Per group, (seed, step) as a tensor: a compiled graph reads and advances it as it does a buffer.
# A group of the same name that was made after this one has been destroyed is another one.
_states: dict[str, Tensor] = {}
_owners: "dict[str, weakref.ref[dist.ProcessGroup] | None]" = {}


def find_state(world: World) -> Key | None:
    """Return the seed and the step of a group's next shuffle; None before its first."""
    owner = _owners.get(world.name)
    if world.name not in _states or (None if owner is None else owner()) is not world.group:
        return None
    seed, step = _states[world.name].tolist()
    return Key(seed, step)


def keep_state(world: World, key: Key) -> None:
    """Set the seed and the step of a group's next shuffle."""
    with torch.inference_mode(False):
        _states[world.name] = torch.tensor([key.seed, key.step])
    _owners[world.name] = None if world.group is None else weakref.ref(world.group)


def advance_state(world: World) -> None:
    """Count a step, in a group that has a state."""
    _states[world.name][1] += 1


def new_seed() -> int:
    """Return a seed from the operating system: no random state of the user's is touched."""
    return secrets.randbits(62)


def next_key_in_graph(world: World) -> Key:
    """Return the key of the next shuffle as tensors and advance it, inside a compiled graph."""
    _agree_while_tracing(world.name)
    state = _states[world.name]
    seed, step = state.clone().unbind()
    state[1].add_(1)
    return Key(seed, step)


def _agree_while_tracing(name: str) -> int:
    """Agree on a seed, if the group has none, while its ranks trace their first shuffle."""
    world = find_world(name)
    if find_state(world) is None:
        seed = new_seed()
        if world.size > 1:
            device = default_device(world)
            seed = collectives.gather_numbers([seed], device, world, "batch_shuffle")[0][0]
        keep_state(world, Key(seed, 0))
    return 0


# As torch.compiler.assume_constant_result marks it, without its import of the whole compiler, which
# would make this library's take two seconds.
_agree_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def get_shuffle_state(process_group: ProcessGroupLike = None) -> tuple[int, int] | None:
    """Return the seed and the step of a group's next `batch_shuffle`, to go in a checkpoint.

    Communication: none; it is the same on all ranks.

    Args:
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Returns:
        ``(seed, step)``, two ints; None if the group has not shuffled yet.

    Raises:
        TypeError: `process_group` is of another type.

    Example:
        >>> from shuffle_batchnorm import batch_shuffle, get_shuffle_state, set_shuffle_state
        >>> set_shuffle_state((7, 0))
        >>> first = batch_shuffle(torch.arange(8))[0]
        >>> get_shuffle_state()
        (7, 1)
        >>> set_shuffle_state((7, 0))
        >>> bool((batch_shuffle(torch.arange(8))[0] == first).all())
        True
    """
    call = "get_shuffle_state"
    check_process_group(call, process_group)
    state = find_state(resolve(process_group, call))
    return None if state is None else (int(state.seed), int(state.step))


def set_shuffle_state(
    state: tuple[int, int] | None, process_group: ProcessGroupLike = None
) -> None:
    """Set the seed and the step of a group's next `batch_shuffle`, on all ranks alike.

    Without it the ranks agree on a random seed at their first shuffle.

    Communication: none; ranks that disagree find out at the next shuffle.

    Args:
        state: ``(seed, step)`` as `get_shuffle_state` returned it, or of your choice, each from 0
            to ``2**62``; None to agree anew.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Raises:
        TypeError: `state` is not two ints, or `process_group` is of another type.
        ValueError: a number is out of range.
    """
    call = "set_shuffle_state"
    check_process_group(call, process_group)
    world = resolve(process_group, call)
    if state is None:
        _states.pop(world.name, None)
        return
    if not isinstance(state, (tuple, list)) or [type(k) for k in state] != [int, int]:
        raise TypeError(f"{call}: state must be None or two ints, seed and step, got {state!r}")
    if not all(0 <= number <= 2**62 for number in state):
        raise ValueError(f"{call}: seed and step must be from 0 to 2**62, got {state!r}")
    keep_state(world, Key(*state))
