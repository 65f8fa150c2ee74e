"""ShufflePlan, and where the permutation of a shuffle comes from."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from shuffle_batchnorm.comm.world import World

from .permutations import Key, Route
from .state import agreed_state, times_set


@dataclass(frozen=True, eq=False)
class ShufflePlan:
    """Where one shuffle sends the samples of this rank; what `batch_unshuffle` needs to undo it.

    It can be used for any number of batches of the same sizes, whatever their other dimensions
    and dtypes. It belongs to its process group and to this process.

    Attributes:
        world: the ranks.
        sizes: the batch size of every rank.
        key: seed and step of the permutation.
        route: this rank's part.
        origin: what else the ranks must have in common for the plan to be theirs; it stands for
            the seed in a kind of call, where every plan has another one.
    """

    world: World
    sizes: tuple[int, ...]
    key: Key
    route: Route
    origin: str = ""
    # The memory of what this plan has brought back, while somebody holds it: not twice.
    _returned: list[StorageWeakRef] = field(default_factory=list, repr=False)


class Origin(NamedTuple):
    """Where the permutation of a call comes from, the same on all ranks.

    Attributes:
        name: for an error.
        key: seed and step.
        kind: what calls of one kind have in common; never the step.
        is_state: whether the group's state has to be advanced after the call.
    """

    name: str
    key: Key
    kind: Hashable
    is_state: bool = False


def find_origin(
    world: World,
    plan: ShufflePlan | None,
    generator: torch.Generator | None = None,
    error: Exception | None = None,
) -> Origin:
    """Return the origin of a call; a generator moves on by one number.

    Communication: at the first shuffle by the group's state, 2 KiB from every rank to every rank,
    to agree on a seed, or to raise `error` if one has it.
    """
    if isinstance(plan, ShufflePlan):
        sizes = plan.sizes[0] if len(set(plan.sizes)) == 1 else plan.sizes
        name = f"a plan for {sizes} samples per rank{plan.origin and ' of '}{plan.origin}"
        key = Key(int(plan.key.seed), int(plan.key.step))
        return Origin(name, key, ("plan", plan.sizes, plan.origin or key.seed))
    if isinstance(generator, torch.Generator):
        name = f"a generator seeded with {generator.initial_seed()}"
        if generator.device.type == "cpu":
            key = Key(int(torch.randint(2**62, (), generator=generator, device="cpu")), 0)
        else:  # to read a number that is drawn on a GPU is to wait for it
            key = Key(generator.initial_seed() % 2**62, generator.get_offset())
            generator.set_offset(generator.get_offset() + 4)
        return Origin(name, key, name)
    key = agreed_state(world, error)
    return Origin("the group's state", key, ("state", key.seed, times_set(world)), is_state=True)
