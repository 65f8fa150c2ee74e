"""The seed and the step of a group's next shuffle: agreed on once, then counted by every rank."""

import secrets
import weakref
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from shuffle_batchnorm.comm import agreement
from shuffle_batchnorm.comm.world import (
    ProcessGroupLike,
    World,
    check_process_group,
    find_name,
    find_world,
    resolve,
)

from .permutations import Key

_AGREEING = "batch_shuffle, agreeing on a seed"

# Per group, (seed, step) as a tensor: a compiled graph reads and advances it as it does a buffer.
# A group of the same name that was made after this one has been destroyed is another one.
_states: dict[str, Tensor] = {}
_owners: "dict[str, weakref.ref[dist.ProcessGroup] | None]" = {}
_times_set: Counter[str] = Counter()


def find_state(world: World) -> Key | None:
    """Return the seed and the step of a group's next shuffle; None before its first."""
    owner = _owners.get(world.name)
    if world.name not in _states or (None if owner is None else owner()) is not world.group:
        return None
    seed, step = _states[world.name].tolist()
    return Key(seed, step)


def agreed_state(world: World, error: Exception | None = None) -> Key:
    """Return the seed and the step of a group's next shuffle; before its first, agree on rank 0's.

    Communication: before the first shuffle, 2 KiB from every rank to every rank.

    Raises:
        Exception: `error`, why this rank can't go on, on all ranks, before the first shuffle.
    """
    state = find_state(world)
    if state is None:
        # From the operating system: no random state of the user's is touched.
        own = secrets.randbits(62)
        state = Key(agreement.agree(_AGREEING, {}, error, world, own)[0], 0)
        _keep(world, state)
    return state


def _keep(world: World, key: Key) -> None:
    with torch.inference_mode(False):
        _states[world.name] = torch.tensor([key.seed, key.step], device="cpu")
    _owners[world.name] = None if world.group is None else weakref.ref(world.group)


def advance_state(world: World) -> None:
    """Count a step, in a group that has a state."""
    _states[world.name][1] += 1


def times_set(world: World) -> int:
    """Return how often this rank has set the group's state: what it is set to is compared anew."""
    return _times_set[world.name]


def next_key_in_graph(world: World) -> Key:
    """Return the key of the next shuffle as tensors and advance it, inside a compiled graph."""
    name = find_name(world)
    _agree_while_tracing(name)
    state = _states[name]
    seed, step = state.clone().unbind()
    state[1].add_(1)
    return Key(seed, step)


def _agree_while_tracing(name: str) -> int:
    """Agree on a seed, if the group has none, while its ranks trace their first shuffle."""
    agreed_state(find_world(name, _AGREEING))
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

    Communication: none; the ranks compare it, with 2 KiB each, at the next shuffle.

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
    elif not isinstance(state, (tuple, list)) or [type(k) for k in state] != [int, int]:
        raise TypeError(f"{call}: state must be None or two ints, seed and step, got {state!r}")
    elif not all(0 <= number <= 2**62 for number in state):
        raise ValueError(f"{call}: seed and step must be from 0 to 2**62, got {state!r}")
    else:
        _keep(world, Key(*state))
    _times_set[world.name] += 1
