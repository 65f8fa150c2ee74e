"""batch_shuffle and batch_unshuffle: every sample to another rank and back, once, differentiably.

This is MoCo's way of shuffling batch norm. The layers of this library do the same without moving
samples; see ``docs/batch_shuffle.md`` for when to choose which.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from shuffle_batchnorm.comm import failures
from shuffle_batchnorm.comm.world import (
    ProcessGroupLike,
    World,
    default_device,
    resolve,
    usable_device,
)

from .checks import (
    SHUFFLE,
    UNSHUFFLE,
    check_fit,
    check_leaves,
    check_not_returned,
    check_process_group,
    check_sources,
    not_a_plan,
    raise_alone,
    strange_kind,
)
from .habits import Form, expected_form, note_form
from .permutations import Key, is_stratified, make_route, stratified_route
from .plan import ShufflePlan, describe
from .state import (
    GENERATOR,
    NEW_SEED,
    STATE,
    Terms,
    advance_state,
    agree,
    find_state,
    keep_state,
    new_seed,
    next_key_in_graph,
    stamp_of,
)
from .transport import OtherStampError, move_nothing, move_samples, stamped_width

Tree = Any  # a tensor, or tensors and None in tuples, lists, dicts, ...


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
        with every sample (up to 71 with one of 4 to 128 KiB) where a loop repeats itself and W
        divides one common N, otherwise by 72 bytes from every rank to every rank beforehand. Under
        ``torch.compile`` nothing is compared: there the ranks' batches have to be alike, and W has
        to divide N.

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
    check_process_group(SHUFFLE, process_group)
    if isinstance(plan, ShufflePlan) and process_group is None:
        world = plan.world
    else:
        world = resolve(process_group, SHUFFLE)
    leaves, spec = pytree.tree_flatten(batch)
    if torch.compiler.is_compiling():
        if generator is not None:
            raise ValueError(f"{SHUFFLE}: generator is not supported under torch.compile")
        return _shuffle_in_graph(leaves, spec, world, plan)

    n, error = 0, None
    key, order = _choose_key(world, generator, plan)
    try:
        check_sources(plan, generator)
        n = check_leaves(SHUFFLE, leaves, world)
        if plan is not None:
            check_fit(SHUFFLE, n, world, plan)
    except (TypeError, ValueError, RuntimeError) as caught:
        error = caught
    terms = _terms(SHUFFLE, order, leaves, spec, key)

    def find_plan(sizes: tuple[int, ...], seed: int) -> ShufflePlan:
        agreed = Key(seed, key.step)
        route = make_route(agreed, sizes, world.rank).to(_tensors(leaves)[0].device)
        return ShufflePlan(world, sizes, agreed, route)

    known = plan if isinstance(plan, ShufflePlan) else find_plan
    moved, plan = _agree_and_move(terms, leaves, n, error, world, known)
    if order == STATE:
        advance_state(world)
    elif order == NEW_SEED:
        keep_state(world, Key(plan.key.seed, plan.key.step + 1))
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
    if not isinstance(plan, ShufflePlan):
        # Which group the others wait in is not known here.
        raise_alone(UNSHUFFLE, TypeError(not_a_plan(UNSHUFFLE, plan)))
    world = plan.world
    leaves, spec = pytree.tree_flatten(batch)
    if torch.compiler.is_compiling():
        check_fit(UNSHUFFLE, check_leaves(UNSHUFFLE, leaves, world), world, plan)
        return _unflatten(_move(UNSHUFFLE, _tensors(leaves), plan), leaves, spec)

    n, error = 0, None
    try:
        n = check_leaves(UNSHUFFLE, leaves, world)
        check_fit(UNSHUFFLE, n, world, plan)
        check_not_returned(leaves, plan)
    except (TypeError, ValueError) as caught:
        error = caught
    terms = _terms(UNSHUFFLE, describe(plan), leaves, spec, plan.key)
    moved, _ = _agree_and_move(terms, leaves, n, error, world, plan)
    alive = [ref for ref in plan._returned if not ref.expired()]
    plan._returned[:] = alive + [StorageWeakRef(leaf.untyped_storage()) for leaf in moved]
    return _unflatten(moved, leaves, spec)


def reject(plan: ShufflePlan, error: Exception) -> NoReturn:
    """Take part in the `batch_unshuffle` for which this rank has no batch, and raise its error.

    Communication: as `batch_unshuffle`; the ranks stay in step.
    """
    terms = Terms(UNSHUFFLE, describe(plan), "", "", "", int(plan.key.seed), int(plan.key.step))
    _agree_and_move(terms, [], 0, error, plan.world, plan)
    raise error


def _agree_and_move(
    terms: Terms,
    leaves: list[Any],
    n: int,
    error: Exception | None,
    world: World,
    plan: ShufflePlan | Callable[[tuple[int, ...], int], ShufflePlan],
) -> tuple[tuple[Tensor, ...], ShufflePlan]:
    """Move the tensors among the leaves by a plan, or one that is found from sizes and seed.

    If the ranks call as they did the last time round, they agree by the message itself: a hash of
    their terms travels with the samples. If not, or at a first time, by a header before it.
    """

    def find(sizes: tuple[int, ...], seed: int) -> ShufflePlan:
        return plan if isinstance(plan, ShufflePlan) else plan(sizes, seed)

    if world.size == 1:
        if error is not None:
            raise error
        found = find((n,), terms.seed)
        return _move(terms.call, _tensors(leaves), found), found

    fits = error is None and (not isinstance(plan, ShufflePlan) or is_stratified(plan.sizes))
    form = Form(terms.call, n, stamped_width(_tensors(leaves))) if fits and n else None
    expected = expected_form(world)
    if form is not None and form == expected:
        with _in_step(world):
            found = find((n,) * world.size, terms.seed)
            try:
                moved = _move(terms.call, _tensors(leaves), found, stamp_of(terms))
            except OtherStampError:
                pass  # all ranks go on to tell each other what they have sent
            else:
                note_form(world, form)
                return moved, found
    elif expected is not None:
        with _own_first(error), _in_step(world):
            move_nothing(*expected, world, _device(leaves, world))
    with _own_first(error):
        sizes, seed = agree(terms, n, error, world, _device(leaves, world))
    with _in_step(world):
        found = find(sizes, seed)
        moved = _move(terms.call, _tensors(leaves), found)
    note_form(world, form if is_stratified(sizes) else None)
    return moved, found


@contextlib.contextmanager
def _own_first(error: Exception | None) -> Iterator[None]:
    """Raise what is wrong on this rank, if anything is, in place of what follows from it."""
    try:
        yield
    except RuntimeError as failure:
        if error is None or failure is error:
            raise
        raise error from failure


@contextlib.contextmanager
def _in_step(world: World) -> Iterator[None]:
    """Give up the group if this rank alone can't go through with what all are doing."""
    try:
        yield
    except Exception as error:
        failures.break_off(world, str(error))
        raise


def _move(
    call: str, tensors: list[Tensor], plan: ShufflePlan, stamp: int | None = None
) -> tuple[Tensor, ...]:
    route = plan.route.to(tensors[0].device)
    if call == UNSHUFFLE:
        route = route.inverse()
    return move_samples(call, route, plan.world, tensors, stamp)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf is not None]


def _unflatten(moved: Sequence[Tensor], leaves: list[Any], spec: Any) -> Tree:
    new = iter(moved)
    return pytree.tree_unflatten([None if leaf is None else next(new) for leaf in leaves], spec)


def _shuffle_in_graph(
    leaves: list[Any], spec: Any, world: World, plan: ShufflePlan | None
) -> tuple[Tree, ShufflePlan]:
    """Shuffle inside a compiled graph: no header, stratified, with the step as a tensor."""
    n = check_leaves(SHUFFLE, leaves, world)
    if plan is not None:
        check_fit(SHUFFLE, n, world, plan)
    elif n % world.size:
        raise ValueError(
            f"{SHUFFLE}: under torch.compile the batch must be divisible by the number of ranks, "
            f"got {n} samples on {world.size} ranks"
        )
    else:
        key = next_key_in_graph(world)
        device = _device(leaves, world)
        route = stratified_route(key, n, world.size, world.rank, device)
        plan = ShufflePlan(world, (n,) * world.size, key, route, _returned=[])
    return _unflatten(_move(SHUFFLE, _tensors(leaves), plan), leaves, spec), plan


def _choose_key(
    world: World, generator: torch.Generator | None, plan: ShufflePlan | None
) -> tuple[Key, str]:
    """Return the key of this call and where it comes from."""
    if isinstance(plan, ShufflePlan):
        return plan.key, describe(plan)
    if isinstance(generator, torch.Generator):
        # Drawn before anything can fail, so that the ranks' generators stay in step.
        drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
        return Key(int(drawn), 0), GENERATOR
    state = find_state(world)
    if state is None:
        return Key(new_seed(), 0), NEW_SEED
    return state, STATE


def _terms(call: str, order: str, leaves: list[Any], spec: Any, key: Key) -> Terms:
    kinds = tuple(
        "None" if leaf is None else strange_kind(leaf) or (leaf.shape[1:], leaf.dtype)
        for leaf in leaves
    )
    graded = torch.is_grad_enabled()
    gradient = [graded and isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
    return Terms(
        call, order, _describe_tree(spec), _describe_kinds(kinds), str(gradient),
        int(key.seed), int(key.step),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _describe_kinds(kinds: tuple[str | tuple[torch.Size, torch.dtype], ...]) -> str:
    return ", ".join(
        kind if isinstance(kind, str) else f"[N{''.join(f', {n}' for n in kind[0])}] {kind[1]}"
        for kind in kinds
    )


def _describe_tree(spec: Any) -> str:
    if spec.is_leaf():
        return "*"
    # What a node's context prints of its address is no difference between ranks.
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(spec).split()))


def _device(leaves: list[Any], world: World) -> torch.device:
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    tensor = next(tensors, None)
    if tensor is None:
        return default_device(world)
    return usable_device(world, tensor.device)
