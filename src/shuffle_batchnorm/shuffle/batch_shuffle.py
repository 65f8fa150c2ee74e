"""batch_shuffle and batch_unshuffle: every sample to another rank and back, once, differentiably.

This is MoCo's way of shuffling batch norm. The layers of this library do the same without moving
samples; see ``docs/batch_shuffle.md`` for when to choose which.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from shuffle_batchnorm.comm import agreement
from shuffle_batchnorm.comm.world import ProcessGroupLike, World, check_process_group, resolve

from .checks import (
    SHUFFLE,
    UNSHUFFLE,
    announce,
    check_fit,
    check_handle,
    check_leaves,
    check_plan,
    check_shuffle,
    check_unshuffle,
    find_error,
    raise_if_trusted,
)
from .permutations import Route, make_route, make_route_in_graph
from .plan import Origin, ShufflePlan, find_origin
from .state import advance_state, next_key_in_graph
from .transport import move_samples

Tree = Any  # a tensor, or tensors and None in tuples, lists, dicts, ...


def batch_shuffle(
    batch: Tree,
    *,
    process_group: ProcessGroupLike = None,
    generator: torch.Generator | None = None,
    plan: ShufflePlan | None = None,
    uneven: bool = False,
) -> tuple[Tree, ShufflePlan]:
    r"""Shuffle the samples of all ranks' batches among the ranks; batch sizes stay what they are.

    .. math:: y_q = x_{\pi(q)}

    where x and y are all ranks' samples in a row. If W divides one common N, the permutation is
    *stratified*: every rank sends N / W samples, randomly chosen, to every rank, and every rank
    puts those it receives in random order; so a sample keeps 1 / W of the batch's other samples
    around it. Otherwise it is uniform over all samples. It depends on a seed and a step only,
    which the ranks agree on once and then count (`get_shuffle_state`); no global random state is
    touched.

    Communication:
        One ``all_to_all_single`` that holds all tensors: each sample travels once, about
        ``N * (W - 1) / W`` samples leave and reach each rank; backward the same for tensors that
        need a gradient. A call of a new kind is compared first, with 2 KiB from every rank to
        every rank, and all ranks raise if one can't go on; later calls of that kind are trusted.
        The kind is N, the shapes behind it, dtypes, what needs a gradient, the tree, and the
        permutation's origin and seed. Batch sizes that change on all ranks together are therefore
        compared once; sizes that change on single ranks need ``uneven=True``, or the process may
        abort or hang. Under ``torch.compile`` nothing is compared: there the ranks' batches have
        to be alike, and W has to divide N.

    Args:
        batch: a tensor ``[N, *]`` of any dtype, or tensors of the same N and device, and None, in
            tuples, lists, dicts or other pytrees. N may differ between ranks, and be 0.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.
        generator: draws the permutation instead, one number per call; seeded alike on all ranks.
            Not under ``torch.compile``.
        plan: shuffles as an earlier call did, in the plan's group.
        uneven: compare at every call, on all ranks, for a loop in which N changes on single ranks.
            Not under ``torch.compile``.

    Returns:
        The shuffled batch, with this rank's N; and the plan for `batch_unshuffle`. Peak memory
        beyond the batch is twice its size; channels_last tensors stay so.

    Raises:
        TypeError: something in the batch is no tensor; a plan or group of another type.
        ValueError: a scalar, no tensor, tensors of different N or devices, a plan of another
            batch size or group. On every rank, at a call of a new kind, if ranks disagree on
            trees, shapes, dtypes, needed gradients, plans, generators or states.
        RuntimeError: on the peers of a rank that rejects its batch: at once, before the ranks have
            agreed on any shuffle and with ``uneven=True``, and all can go on; later within seconds
            on the CPU, and by the group's time limit on a GPU, and the group is of no more use.
            In the capture of a CUDA graph, unless `plan` was made before.

    Source:
        Shuffling BN: He et al. 2019, arXiv 1911.05722, section 3.3.

    Example:
        >>> images = torch.arange(8.0).view(8, 1)
        >>> shuffled, plan = batch_shuffle(images)
        >>> features = 10 * shuffled
        >>> batch_unshuffle(features, plan).flatten().tolist()
        [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0]
    """
    check_handle(check_process_group, SHUFFLE, process_group)
    if isinstance(plan, ShufflePlan) and process_group is None:
        world = plan.world
    else:
        world = resolve(process_group, SHUFFLE)
    leaves, spec = pytree.tree_flatten(batch)
    if torch.compiler.is_compiling():
        if generator is not None or uneven:
            option = "uneven" if uneven else "generator"
            raise ValueError(f"{SHUFFLE}: {option} is not supported under torch.compile")
        return _shuffle_in_graph(leaves, spec, world, plan)

    error = find_error(check_shuffle, leaves, world, plan, generator)
    if not uneven:
        raise_if_trusted(SHUFFLE, error, world)
    origin = find_origin(world, plan, generator, error)
    sizes = _agree(SHUFFLE, leaves, spec, origin, error, world, uneven)
    if plan is None:
        route = make_route(origin.key, sizes, world.rank).to(_tensors(leaves)[0].device)
        plan = ShufflePlan(world, sizes, origin.key, route, "" if origin.is_state else origin.name)
    moved = _move(SHUFFLE, leaves, plan.route, world)
    if origin.is_state:
        advance_state(world)
    return _unflatten(moved, leaves, spec), plan


def batch_unshuffle(batch: Tree, plan: ShufflePlan) -> Tree:
    r"""Send every sample back to the rank and position it had before `batch_shuffle`.

    .. math:: x_{\pi(q)} = y_q

    Communication: as `batch_shuffle`.

    Args:
        batch: a tensor ``[N, *]`` or a pytree of tensors and None, N samples in the order in
            which `batch_shuffle` returned them, such as features: dimensions after the first, and
            dtypes, may be others.
        plan: what `batch_shuffle` returned.

    Returns:
        The batch in the order before the shuffle.

    Raises:
        TypeError: something in the batch is no tensor; `plan` is no plan.
        ValueError: as `batch_shuffle`; N is not the plan's; a tensor that was unshuffled with this
            plan already, or a view of it. One that was computed from such a tensor is a new one.
        RuntimeError: as `batch_shuffle`.

    Example:
        >>> shuffled, plan = batch_shuffle({"image": torch.rand(4, 3, 8, 8), "label": None})
        >>> batch_unshuffle({"features": torch.rand(4, 16)}, plan)["features"].shape
        torch.Size([4, 16])
    """
    check_handle(check_plan, UNSHUFFLE, plan)
    world = plan.world
    leaves, spec = pytree.tree_flatten(batch)
    if torch.compiler.is_compiling():
        check_leaves(UNSHUFFLE, leaves, world)
        check_fit(UNSHUFFLE, leaves, world, plan)
        return _unflatten(_move(UNSHUFFLE, leaves, plan.route.inverse(), world), leaves, spec)

    error = find_error(check_unshuffle, leaves, plan)
    raise_if_trusted(UNSHUFFLE, error, world)
    _agree(UNSHUFFLE, leaves, spec, find_origin(world, plan), error, world)
    moved = _move(UNSHUFFLE, leaves, plan.route.inverse(), world)
    alive = [ref for ref in plan._returned if not ref.expired()]
    plan._returned[:] = alive + [StorageWeakRef(leaf.untyped_storage()) for leaf in moved]
    return _unflatten(moved, leaves, spec)


def _agree(
    call: str,
    leaves: list[Any],
    spec: Any,
    origin: Origin,
    error: Exception | None,
    world: World,
    uneven: bool = False,
) -> tuple[int, ...]:
    """Compare a call of a new kind with the other ranks', and return all ranks' batch sizes."""
    if error is not None:
        agreement.agree(call, {}, error, world)
    tensors = _tensors(leaves)
    n, graded = tensors[0].shape[0], torch.is_grad_enabled()
    tree = _describe_tree(spec)
    kinds = tuple([leaf if leaf is None else (leaf.shape[1:], leaf.dtype) for leaf in leaves])
    needs_gradient = tuple([graded and leaf.requires_grad for leaf in tensors])
    kind = call, n, tree, kinds, needs_gradient, origin.kind
    sizes = None if uneven else agreement.recall(world, kind)
    if sizes is None:
        terms = {
            "order": origin.name,
            "uneven": uneven,
            "tree": tree,
            "leaves": _describe_kinds(kinds),
            "needs_gradient": list(needs_gradient),
            "seed": origin.key.seed,
            "step": origin.key.step,
        }
        sizes = agreement.agree(call, terms, None, world, own=n)
        agreement.remember(world, call, sizes)  # see `raise_if_trusted`
        if not uneven:
            agreement.remember(world, kind, sizes)
    return tuple(sizes)


def _move(call: str, leaves: list[Any], route: Route, world: World) -> tuple[Tensor, ...]:
    try:
        return move_samples(call, route, world, _tensors(leaves))
    except Exception as error:  # such as too little memory, on this rank alone
        announce(error, world)
        raise


def _shuffle_in_graph(
    leaves: list[Any], spec: Any, world: World, plan: ShufflePlan | None
) -> tuple[Tree, ShufflePlan]:
    """Shuffle inside a compiled graph: nothing compared, stratified, with the step as a tensor."""
    check_leaves(SHUFFLE, leaves, world)
    first = _tensors(leaves)[0]
    if plan is not None:
        check_fit(SHUFFLE, leaves, world, plan)
    elif first.shape[0] % world.size:
        raise ValueError(
            f"{SHUFFLE}: under torch.compile the batch must be divisible by the number of ranks, "
            f"got {first.shape[0]} samples on {world.size} ranks"
        )
    else:
        key, sizes = next_key_in_graph(world), (first.shape[0],) * world.size
        route = make_route_in_graph(key, sizes, world.rank, first.device)
        plan = ShufflePlan(world, sizes, key, route, _returned=[])
    return _unflatten(_move(SHUFFLE, leaves, plan.route, world), leaves, spec), plan


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf is not None]


def _unflatten(moved: Sequence[Tensor], leaves: list[Any], spec: Any) -> Tree:
    new = iter(moved)
    return pytree.tree_unflatten([None if leaf is None else next(new) for leaf in leaves], spec)


def _describe_kinds(kinds: Sequence[tuple[torch.Size, torch.dtype] | None]) -> str:
    return ", ".join(
        "None" if kind is None else f"[N{''.join(f', {n}' for n in kind[0])}] {kind[1]}"
        for kind in kinds
    )


@lru_cache(maxsize=256)
def _describe_tree(spec: Any) -> str:
    if spec.is_leaf():
        return "*"
    # What a node's context prints of its address is no difference between ranks.
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(spec).split()))
