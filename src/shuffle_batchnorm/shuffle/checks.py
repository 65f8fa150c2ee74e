"""What a batch, a plan and a generator have to be, before samples move."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shuffle_batchnorm.comm import agreement, failures
from shuffle_batchnorm.comm.recomputation import is_recomputation
from shuffle_batchnorm.comm.world import World, resolve, usable_device

from .permutations import REPEATED
from .plan import ShufflePlan

SHUFFLE, UNSHUFFLE = "batch_shuffle", "batch_unshuffle"


def find_error(check: Callable[..., None], *arguments: Any) -> Exception | None:
    """Return what a check raises."""
    try:
        check(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return error
    return None


def announce(error: Exception, world: World) -> None:
    """Tell the peers of this rank, which wait for it in their next exchange, why it stops."""
    if not torch.compiler.is_compiling():
        failures.announce(world, str(error))


def check_handle(check: Callable[..., None], call: str, handle: Any) -> None:
    """Raise what makes a group or a plan unacceptable, and tell the ranks of the default group.

    Which group the peers wait in is not known then.
    """
    error = find_error(check, call, handle)
    if error is not None:
        announce(error, resolve(None, call))
        raise error


def raise_if_trusted(call: str, error: Exception | None, world: World) -> None:
    """Raise an error at once if the peers trust this rank and don't compare their calls again."""
    if error is not None and agreement.recall(world, call) is not None:
        announce(error, world)
        raise error


def check_shuffle(leaves: list[Any], world: World, plan: Any, generator: Any) -> None:
    """Raise what makes a batch, a plan or a generator unacceptable."""
    if is_recomputation() and plan is None:
        raise RuntimeError(REPEATED)
    if plan is not None:
        check_plan(SHUFFLE, plan)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{SHUFFLE}: generator must be a torch.Generator, got {type(generator).__name__}"
        )
    if plan is not None and generator is not None:
        raise ValueError(f"{SHUFFLE}: plan says where samples go; generator must be None then")
    check_leaves(SHUFFLE, leaves, world)
    if plan is not None:
        check_fit(SHUFFLE, leaves, world, plan)
    elif (
        any(leaf is not None and leaf.is_cuda for leaf in leaves)
        and torch.cuda.is_current_stream_capturing()
    ):
        raise RuntimeError(
            f"{SHUFFLE}: a CUDA graph can't be given another permutation at every replay; shuffle "
            "outside the graph, or pass plan="
        )


def check_unshuffle(leaves: list[Any], plan: ShufflePlan) -> None:
    """Raise what makes a batch unacceptable to a plan."""
    check_leaves(UNSHUFFLE, leaves, plan.world)
    check_fit(UNSHUFFLE, leaves, plan.world, plan)
    # By their memory, which a view or a detached tensor has in common with what was returned.
    returned = {ref.cdata for ref in plan._returned if not ref.expired()}
    for k, leaf in enumerate(leaves):
        if leaf is not None and StorageWeakRef(leaf.untyped_storage()).cdata in returned:
            raise ValueError(
                f"{UNSHUFFLE}: leaf {k}, shape {tuple(leaf.shape)}, was unshuffled with this plan "
                "already; unshuffle what was computed from the shuffled batch, and once"
            )


def check_plan(call: str, plan: Any) -> None:
    """Raise a TypeError for what is no plan."""
    if not isinstance(plan, ShufflePlan):
        raise TypeError(f"{call}: plan must be what {SHUFFLE} returned, got {type(plan).__name__}")


def check_leaves(call: str, leaves: list[Any], world: World) -> None:
    """Raise unless the leaves are tensors of one batch that can be moved, or None."""
    tensors: list[Tensor] = []
    for k, leaf in enumerate(leaves):
        if leaf is None:
            continue
        kind = strange_kind(leaf)
        if kind:
            raise TypeError(f"{call}: expected dense tensors (or None), got {kind} in leaf {k}")
        if leaf.ndim == 0:
            raise ValueError(
                f"{call}: leaf {k} is a scalar ({leaf.dtype}); every tensor needs a leading "
                "dimension N, its samples"
            )
        tensors.append(leaf)
        if leaf.shape[0] != tensors[0].shape[0]:
            raise ValueError(
                f"{call}: tensors disagree on the number of samples: {tensors[0].shape[0]} in "
                f"shape {tuple(tensors[0].shape)}, {leaf.shape[0]} in shape {tuple(leaf.shape)}"
            )
        if leaf.device != tensors[0].device:
            raise ValueError(
                f"{call}: tensors are on different devices: {tensors[0].device} and {leaf.device}"
            )
    if not tensors:
        raise ValueError(f"{call}: the batch has no tensor")
    device = tensors[0].device
    usable = usable_device(world, device)
    if usable.type != device.type:
        raise ValueError(
            f"{call}: tensors are on {device}; the process group communicates on {usable}"
        )


def strange_kind(leaf: Any) -> str:
    """Return what a leaf is that has no samples to move; nothing if it is an ordinary tensor."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    if leaf.layout != torch.strided:
        return str(leaf.layout)
    if type(leaf) is Tensor and not (leaf.is_nested or leaf.is_quantized or leaf.is_meta):
        return ""  # as a rule
    kinds = {
        "DTensor": hasattr(leaf, "device_mesh"),
        "nested": leaf.is_nested,
        "quantized": leaf.is_quantized,
        "meta": leaf.is_meta,
    }
    return " ".join([name for name, so in kinds.items() if so])


def _are_captured(leaves: list[Any]) -> bool:
    """Return whether a CUDA graph is made of what happens to these tensors and None."""
    on_gpu = any(leaf is not None and leaf.is_cuda for leaf in leaves)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def check_fit(call: str, leaves: list[Any], world: World, plan: ShufflePlan) -> None:
    """Raise a ValueError if a plan can't be used for a batch."""
    if plan.world != world:
        raise ValueError(
            f"{call}: the plan is of rank {plan.world.rank} of {plan.world.size} in group "
            f"{plan.world.name!r}; the call is of rank {world.rank} of {world.size} in group "
            f"{world.name!r}"
        )
    n, *_ = [leaf.shape[0] for leaf in leaves if leaf is not None]
    if n != plan.sizes[plan.world.rank]:
        raise ValueError(
            f"{call}: batch of {n} samples; the plan is for {plan.sizes[plan.world.rank]} samples "
            f"on rank {plan.world.rank} (all ranks: {plan.sizes})"
        )
