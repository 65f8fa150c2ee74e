"""batch_shuffle and batch_unshuffle: every sample to another rank and back, once, differentiably.

This is MoCo's way of shuffling batch norm. The layers of this library do the same without moving
samples; see ``docs/batch_shuffle.md`` for when to choose which.
"""

import contextlib
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import exchange, shuffle_agreement
from .exchange import ProcessGroupLike, World
from .habits import Form, expected_form, note_form
from .moves import OtherStampError, move_nothing, move_samples, stamped_width
from .permutations import Key, Route, is_stratified, make_route, stratified_route
from .shuffle_agreement import (
    GENERATOR,
    NEW_SEED,
    PLAN,
    STATE,
    Terms,
    agree,
    stamp,
)

Tree = Any  # a tensor, or tensors and None in tuples, lists, dicts, ...

SHUFFLE, UNSHUFFLE = "batch_shuffle", "batch_unshuffle"


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
    """

    world: World
    sizes: tuple[int, ...]
    key: Key
    route: Route
    # What this plan has brought back and somebody still holds: it must not be brought back twice.
    _returned: "list[weakref.ref[Tensor]]" = field(default_factory=list, repr=False)


def batch_shuffle(
    batch: Tree,
    *,
    process_group: ProcessGroupLike = None,
    generator: torch.Generator | None = None,
    plan: ShufflePlan | None = None,
) -> tuple[Tree, ShufflePlan]:
    r"""Shuffle the samples of all ranks' batches among the ranks; batch sizes stay what they are.

    .. math:: y_q = x_{\pi(q)}

    where x and y are all ranks' samples in a row. If W divides one common N, the permutation is
    *stratified*: every rank sends N / W samples, randomly chosen, to every rank, and every rank
    puts those it receives in random order; so 1 / W of a sample's company stays. Otherwise it is
    uniform over all samples. It depends on a seed and a step only, which the ranks agree on once
    and then count (`get_shuffle_state`); no global random state is touched.

    Communication:
        One ``all_to_all_single`` that holds all tensors: each sample travels once, about
        ``N * (W - 1) / W`` samples leave and reach each rank; backward the same for tensors that
        need a gradient. The ranks compare their calls, and all raise if one can't go on: by 8 bytes
        with every sample where a loop repeats itself and W divides one common N, otherwise by 72
        bytes from every rank to every rank beforehand. Under ``torch.compile`` nothing is compared:
        there the ranks' batches have to be alike, and W has to divide N.

    Args:
        batch: a tensor ``[N, *]`` of any dtype, or tensors of the same N and device, and None, in
            tuples, lists, dicts or other pytrees. N may differ between ranks, and be 0.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.
        generator: draws the permutation instead, one number per call; seeded alike on all ranks.
            Not under ``torch.compile``.
        plan: shuffles as an earlier call did, in the plan's group.

    Returns:
        The shuffled batch, with this rank's N; and the plan for `batch_unshuffle`. Peak memory
        beyond the batch is twice its size, of which on a CPU one half is kept for the next call;
        channels_last tensors stay so.

    Raises:
        TypeError: something in the batch is no tensor; a plan or group of another type.
        ValueError: a scalar, no tensor, tensors of different N or devices, a plan of another
            batch size or group; on every rank, if ranks disagree on trees, shapes, dtypes, needed
            gradients, plans, generators or states.
        RuntimeError: on the peers of a rank that rejects its batch.

    Source:
        Shuffling BN: He et al. 2019, arXiv 1911.05722, section 3.3.

    Example:
        >>> images = torch.arange(8.0).view(8, 1)
        >>> shuffled, plan = batch_shuffle(images)
        >>> features = 10 * shuffled
        >>> batch_unshuffle(features, plan).flatten().tolist()
        [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0]
    """
    _check_plan(SHUFFLE, plan)
    exchange.check_process_group(SHUFFLE, process_group)
    if plan is not None and process_group is None:
        world = plan.world
    else:
        world = exchange.resolve(process_group, SHUFFLE)
    leaves, spec = pytree.tree_flatten(batch)
    if torch.compiler.is_compiling():
        return _shuffle_in_graph(leaves, spec, world, plan)

    key, order = _choose_key(world, generator, plan)
    n, error = 0, None
    try:
        n = _check_leaves(SHUFFLE, leaves)
        if plan is not None:
            _check_fit(SHUFFLE, n, world, plan, generator)
    except (TypeError, ValueError) as caught:
        error = caught
    terms = _terms(SHUFFLE, order, leaves, spec, key)

    def find_plan(sizes: tuple[int, ...], seed: int) -> ShufflePlan:
        agreed = Key(seed, key.step)
        route = make_route(agreed, sizes, world.rank).to(_device(leaves, world))
        return ShufflePlan(world, sizes, agreed, route)

    find = find_plan if plan is None else lambda *_: plan
    moved, plan = _agree_and_move(terms, leaves, n, error, world, find)
    if order in (STATE, NEW_SEED):
        shuffle_agreement.keep_state(world, Key(plan.key.seed, plan.key.step + 1))
    return _unflatten(moved, leaves, spec), plan


def batch_unshuffle(batch: Tree, plan: ShufflePlan) -> Tree:
    r"""Send every sample back to the rank and place it had before `batch_shuffle`.

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
        RuntimeError: on the peers of a rank that rejects its batch.

    Example:
        >>> shuffled, plan = batch_shuffle({"image": torch.rand(4, 3, 8, 8), "label": None})
        >>> batch_unshuffle({"features": torch.rand(4, 16)}, plan)["features"].shape
        torch.Size([4, 16])
    """
    if plan is None:
        raise TypeError(f"{UNSHUFFLE}: plan must be what {SHUFFLE} returned, got None")
    _check_plan(UNSHUFFLE, plan)
    world = plan.world
    leaves, spec = pytree.tree_flatten(batch)
    if torch.compiler.is_compiling():
        _check_fit(UNSHUFFLE, _check_leaves(UNSHUFFLE, leaves), world, plan)
        tensors = [leaf for leaf in leaves if leaf is not None]
        return _unflatten(_move(UNSHUFFLE, tensors, plan), leaves, spec)

    n, error = 0, None
    try:
        n = _check_leaves(UNSHUFFLE, leaves)
        _check_fit(UNSHUFFLE, n, world, plan)
        _check_not_returned(leaves, plan)
    except (TypeError, ValueError) as caught:
        error = caught
    terms = _terms(UNSHUFFLE, PLAN, leaves, spec, plan.key)
    moved, _ = _agree_and_move(terms, leaves, n, error, world, lambda *_: plan)
    alive = [ref for ref in plan._returned if ref() is not None]
    plan._returned[:] = alive + [weakref.ref(leaf) for leaf in moved]
    return _unflatten(moved, leaves, spec)


def _agree_and_move(
    terms: Terms,
    leaves: list[Any],
    n: int,
    error: Exception | None,
    world: World,
    find_plan: Callable[[tuple[int, ...], int], ShufflePlan],
) -> tuple[tuple[Tensor, ...], ShufflePlan]:
    """Move the tensors among the leaves by a plan that is found from sizes and seed.

    If the ranks call as they did the last time round, they agree by the message itself: a hash of
    their terms travels with the samples. If not, or at a first time, by a header before it.
    """
    tensors = [leaf for leaf in leaves if leaf is not None]
    form = Form(terms.call, n, stamped_width(tensors)) if error is None else None
    expected = expected_form(world) if world.size > 1 else None
    if expected is not None:
        if form == expected:
            plan = find_plan((n,) * world.size, terms.seed)
            with contextlib.suppress(OtherStampError):
                moved = _move(terms.call, tensors, plan, stamp(terms))
                note_form(world, form)
                return moved, plan
        else:
            _, n_expected, width = expected
            move_nothing(terms.call, world, n_expected, width, _device(leaves, world))
    sizes, seed = agree(terms, n, error, world, _device(leaves, world))
    plan = find_plan(sizes, seed)
    moved = _move(terms.call, tensors, plan)
    if world.size > 1:
        note_form(world, form if n and is_stratified(sizes) else None)
    return moved, plan


def _move(
    call: str, tensors: list[Tensor], plan: ShufflePlan, stamp: int | None = None
) -> tuple[Tensor, ...]:
    route = plan.route.to(tensors[0].device)
    if call == UNSHUFFLE:
        route = route.inverse()
    return move_samples(call, route, plan.world, tensors, stamp)


def _unflatten(moved: Sequence[Tensor], leaves: list[Any], spec: Any) -> Tree:
    new = iter(moved)
    return pytree.tree_unflatten([None if leaf is None else next(new) for leaf in leaves], spec)


def _shuffle_in_graph(
    leaves: list[Any], spec: Any, world: World, plan: ShufflePlan | None
) -> tuple[Tree, ShufflePlan]:
    """Shuffle inside a compiled graph: no header, stratified, with the step as a tensor."""
    n = _check_leaves(SHUFFLE, leaves)
    if plan is not None:
        _check_fit(SHUFFLE, n, world, plan)
    elif n % world.size:
        raise ValueError(
            f"{SHUFFLE}: under torch.compile the batch must be divisible by the number of ranks, "
            f"got {n} samples on {world.size} ranks"
        )
    else:
        key = shuffle_agreement.next_key_in_graph(world)
        device = _device(leaves, world)
        route = stratified_route(key, n, world.size, world.rank, device)
        plan = ShufflePlan(world, (n,) * world.size, key, route, [])
    tensors = [leaf for leaf in leaves if leaf is not None]
    return _unflatten(_move(SHUFFLE, tensors, plan), leaves, spec), plan


def _choose_key(
    world: World, generator: torch.Generator | None, plan: ShufflePlan | None
) -> tuple[Key, str]:
    """Return the key of this call and where it comes from."""
    if plan is not None:
        return plan.key, PLAN
    if generator is not None:
        # Drawn before anything can fail, so that the ranks' generators stay in step.
        drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
        return Key(int(drawn), 0), GENERATOR
    state = shuffle_agreement.find_state(world)
    if state is None:
        return Key(shuffle_agreement.new_seed(), 0), NEW_SEED
    return state, STATE


def _terms(call: str, order: str, leaves: list[Any], spec: Any, key: Key) -> Terms:
    described = [
        "None" if leaf is None else f"[N{''.join(f', {n}' for n in leaf.shape[1:])}] {leaf.dtype}"
        if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves
    ]  # fmt: skip
    gradient = [_needs_gradient(leaf) for leaf in leaves]
    # What a node's context prints of its address is no difference between ranks.
    tree = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(spec).split()))
    return Terms(
        call, order, tree, ", ".join(described), str(gradient), int(key.seed), int(key.step)
    )


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled()


def _device(leaves: list[Any], world: World) -> torch.device:
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    tensor = next(tensors, None)
    return exchange.default_device(world) if tensor is None else tensor.device


def _check_plan(call: str, plan: Any) -> None:
    if plan is not None and not isinstance(plan, ShufflePlan):
        error = TypeError(
            f"{call}: plan must be what {SHUFFLE} returned, got {type(plan).__name__}"
        )
        if not torch.compiler.is_compiling():
            # Which group the others wait in is not known here.
            exchange.report_failure(exchange.resolve(None, call), str(error))
        raise error


def _check_leaves(call: str, leaves: list[Any]) -> int:
    """Return N, or raise what makes this rank's batch unacceptable."""
    tensors: list[Tensor] = []
    for k, leaf in enumerate(leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            kind = leaf.layout if isinstance(leaf, Tensor) else type(leaf).__name__
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
    return tensors[0].shape[0]


def _check_fit(
    call: str,
    n: int,
    world: World,
    plan: ShufflePlan,
    generator: torch.Generator | None = None,
) -> None:
    """Raise a ValueError if a plan can't be used for a batch of n samples."""
    if generator is not None:
        raise ValueError(f"{call}: plan says where samples go; generator must be None then")
    if plan.world != world:
        raise ValueError(
            f"{call}: the plan is of rank {plan.world.rank} of {plan.world.size} in group "
            f"{plan.world.name!r}; the call is of rank {world.rank} of {world.size} in group "
            f"{world.name!r}"
        )
    if n != plan.sizes[plan.world.rank]:
        raise ValueError(
            f"{call}: batch of {n} samples; the plan is for {plan.sizes[plan.world.rank]} samples "
            f"on rank {plan.world.rank} (all ranks: {plan.sizes})"
        )


def _check_not_returned(leaves: list[Any], plan: ShufflePlan) -> None:
    returned = {id(leaf) for leaf in (ref() for ref in plan._returned) if leaf is not None}
    for k, leaf in enumerate(leaves):
        if leaf is not None and (id(leaf) in returned or id(leaf._base) in returned):
            raise ValueError(
                f"{UNSHUFFLE}: leaf {k}, shape {tuple(leaf.shape)}, was unshuffled with this plan "
                "already; unshuffle what was computed from the shuffled batch, and once"
            )
