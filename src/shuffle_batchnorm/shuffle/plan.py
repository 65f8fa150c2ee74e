"""ShufflePlan: where one shuffle sends the samples of a rank."""

from dataclasses import dataclass, field

from torch.multiprocessing.reductions import StorageWeakRef

from shuffle_batchnorm.comm.world import World

from .permutations import Key, Route
from .state import PLAN


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
        origin: what else the ranks must have in common for the plan to be theirs.
    """

    world: World
    sizes: tuple[int, ...]
    key: Key
    route: Route
    origin: str = ""
    # The memory of what this plan has brought back, while somebody holds it: not twice.
    _returned: list[StorageWeakRef] = field(default_factory=list, repr=False)


def describe(plan: ShufflePlan) -> str:
    """Return what a plan is in an agreement: two of one key can be of different sizes."""
    sizes = plan.sizes[0] if len(set(plan.sizes)) == 1 else plan.sizes
    return f"{PLAN} for {sizes} samples per rank{plan.origin and ' of '}{plan.origin}"
