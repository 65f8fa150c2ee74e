"""shuffle_batch_norm: moments of blocks, mix, per-block affine; and its backward."""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shuffle_batchnorm.comm import failures
from shuffle_batchnorm.comm.recomputation import is_recomputation
from shuffle_batchnorm.comm.world import CALL, ProcessGroupLike, World, check_process_group, resolve
from shuffle_batchnorm.kernels import select
from shuffle_batchnorm.kernels.rows import (
    Running,
    are_equal,
    counts,
    is_known,
    move,
    unbiased_variance,
)

from .autograd import Normalise
from .checks import Agreed, agree, check_input, wire_of
from .mixing import Options, Plan, check_options, kept, make_plan
from .statistics import Statistics, check_counts, mix, rejection, statistics_of


def shuffle_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    mode: str = "swap",
    groups: int = 1,
    offset: int = 1,
    blocks: int = 8,
    process_group: ProcessGroupLike = None,
) -> Tensor:
    r"""Normalise each sample with the statistics of the group that its mode says.

    .. math:: y = \frac{x - \mu_S}{\sqrt{\sigma_S^2 + \epsilon}} \cdot w + b

    where S is the normaliser of the sample. Each rank cuts its batch into `groups` equal virtual
    groups, ``G = W * groups`` in all, numbered ``i = rank * groups + j``. S is: in ``"local"`` the
    sample's own group i; in ``"sync"`` all groups pooled; in ``"swap"`` group
    ``(i + offset) mod G``; in ``"regroup"`` the new group ``(i + offset * c) mod G``, where c is
    the sample's block among the ``B = min(G, blocks)`` contiguous blocks of its group, and a new
    group pools the B blocks that join it.

    In eval mode (``training=False``) this is ``torch.nn.functional.batch_norm``.

    Communication:
        Per rank, forward ``[count, mean, std]`` rows of 2C + 1 numbers, backward rows of 2C
        numbers, in float32 (float64 for float64 input). ``local``: none. ``swap``: `groups` rows
        to at most two fixed peers. ``regroup``: ``groups * B`` rows to at most B fixed ranks
        (2 B, if `offset` is more than `groups` and no multiple of it), and as many back; if
        ``G <= blocks``, these rows to all ranks at once, up to 512 KiB received per rank. ``sync``:
        one row to all (all_gather) forward, one all_reduce backward.
        The first training call also compares all ranks' options (2 KiB per rank).

    Args:
        input: ``[N, C, *]``, floating point; N, and each space axis, may differ between ranks.
        running_mean: ``[C]`` or None, updated in place when training.
        running_var: ``[C]`` or None, unbiased, updated in place when training.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        training: normalise with batch statistics; otherwise with the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        mode: ``"local"``, ``"sync"``, ``"swap"`` or ``"regroup"``.
        groups: virtual groups per rank, a divisor of N.
        offset: how many groups away the normaliser is; 0 turns shuffling off.
        blocks: largest number of blocks per group in ``"regroup"``.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Returns:
        Tensor ``[N, C, *]`` in the input's dtype and memory format. Its gradient is that of the
        sum of all ranks' losses, through the statistics of all ranks.

    Raises:
        ValueError: N not divisible by `groups`, a normaliser with 1 value per channel, wrong rank
            or channels, an unknown option, or ranks that disagree; on every rank at the first
            call. Later, the peers of a rank that rejects its input get a RuntimeError.
        TypeError: an input that is not floating point, an option of another type.

    Warns:
        UserWarning: `offset` is a multiple of ``G > 1``, so nothing is shuffled.

    Source:
        Shuffling BN: He et al. 2019, arXiv 1911.05722, section 3.3 and appendix A.9.

    Example:
        >>> x = torch.arange(4.0).view(4, 1)
        >>> shuffle_batch_norm(x, None, None, training=True, groups=2, eps=0.0).flatten().tolist()
        [-5.0, -3.0, 3.0, 5.0]
    """
    options = Options(mode, groups, offset, blocks)
    check_options(CALL, options)
    check_process_group(CALL, process_group)
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return normalise(
        input, running_mean, running_var, weight, bias, momentum, eps, options, process_group,
        _agreed,
    ).output  # fmt: skip


_agreed: Agreed = set()


class Normalised(NamedTuple):
    """The output of a training call, and the statistics behind it."""

    output: Tensor
    statistics: Statistics
    sizes: tuple[int, ...]


def normalise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    options: Options,
    process_group: ProcessGroupLike,
    agreed: Agreed,
    num_features: int | None = None,
) -> Normalised:
    """Normalise with batch statistics and update the running ones. See `shuffle_batch_norm`."""
    check_options(CALL, options)
    world = resolve(process_group)
    plan = make_plan(options, world.size, world.rank)
    _warn_if_nothing_is_shuffled(options, plan)
    parameters = {
        "weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var
    }  # fmt: skip
    _accept(input, parameters, options, plan, world, agreed, num_features)

    plan, sizes = _cut(plan, input.shape[0])
    with torch.no_grad():
        statistics = statistics_of(input, sizes, plan, world)
        check_counts(statistics, sizes, plan, world, input.shape)
        running = None
        if running_mean is not None and running_var is not None and not is_recomputation():
            running = Running(running_mean, running_var, momentum)
        rho, scale = _normaliser_rows(statistics, input, weight, eps, running, sizes, plan)
        sources: tuple[Tensor, ...] | tuple[None, ...] = (None, None, None)
        if statistics.source is not None:
            n, mean, std = statistics.source
            rho_of_source, _ = select.select(std).normaliser_rows(mean, std, None, eps, n, None)
            sources = (n, mean, rho_of_source)
    output = Normalise.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, statistics.values, statistics.mean, rho,
        None if weight is None else scale,  # a compiler refuses the same tensor twice
        *sources, sizes, plan, world,
    )  # fmt: skip
    return Normalised(output, statistics, sizes)


@kept
def _cut(plan: Plan, batch: int) -> tuple[Plan, tuple[int, ...]]:
    """Return the plan for a batch, and the samples in each of its blocks."""
    if plan.world_size == 1 and is_known(batch // plan.groups < plan.per_group):
        # Ranks keep theirs: a peer with a larger batch has samples in blocks that are empty here.
        # So does a graph for batches of any size.
        plan = plan.without_empty_blocks(batch)
    return plan, plan.sizes(batch)


def _warn_if_nothing_is_shuffled(options: Options, plan: Plan) -> None:
    shuffles = options.mode in ("swap", "regroup") and options.offset != 0
    if torch.compiler.is_compiling():
        return
    if shuffles and plan.total_groups > 1 and not any(plan.shifts):
        cause = f"offset={options.offset} is a multiple of the {plan.total_groups} groups"
        if options.offset % plan.total_groups:
            cause = f"blocks={options.blocks} leaves each group whole"
        warnings.warn(f"{CALL}: {cause}, so mode {options.mode!r} shuffles nothing", stacklevel=4)


def _accept(
    input: Tensor,
    parameters: dict[str, Tensor | None],
    options: Options,
    plan: Plan,
    world: World,
    agreed: Agreed,
    num_features: int | None,
) -> None:
    """Raise if this rank or, at the first call, any rank can't accept its input."""
    error: Exception | None = None
    try:
        check_input(input, parameters, options.groups, num_features)
    except (TypeError, ValueError) as caught:
        error = caught
    if world.size == 1 or torch.compiler.is_compiling():
        if error is not None:
            raise error
        return
    wire = wire_of(input, parameters, num_features)
    tensors = [t for t in (input, *parameters.values()) if isinstance(t, Tensor)]
    device = tensors[-1].device if tensors else torch.device("cpu")
    if (failures.serial(world), options, wire) not in agreed:
        dtype = str(getattr(input, "dtype", None))
        agree(world, options, wire, dtype, error, agreed, device)
    elif error is not None:
        # The peers are about to exchange statistics: take part, so that they learn of it.
        mix(rejection(plan, wire.channels, wire.dtype, device), plan, world)
        if options.mode != "local":
            failures.report_failure(world, str(error))
        raise error


def _normaliser_rows(
    statistics: Statistics,
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    running: Running | None,
    sizes: tuple[int, ...],
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Return ``rho = 1 / sqrt(std**2 + eps)`` and ``rho * weight``; move running statistics."""
    values, mean, std = statistics[:3]
    if isinstance(values, Tensor) and running is not None:
        seen = sizes if input.shape[2:].numel() > 0 else (0,) * len(sizes)
        if not are_equal(seen) or seen[0] == 0:
            _move_running(running, values, statistics, seen, plan)
            running = None
    # Else each normaliser has as many blocks here, so their average is that over the blocks.
    return select.select(input).normaliser_rows(mean, std, weight, eps, values, running)


def _move_running(
    running: Running, values: Tensor, statistics: Statistics, sizes: tuple[int, ...], plan: Plan
) -> None:
    """Move the running statistics towards those used, averaged over the blocks with samples.

    Of blocks that differ, or are all empty. In `regroup` the mean over all ranks of these averages
    is the average over all new groups.
    """
    step = running.step
    var = unbiased_variance(statistics.std, values)
    pairs = (running.mean, statistics.mean), (running.var, var)
    if not are_equal(sizes):
        filled = counts(sizes, 1, values) > 0
        for old, batch in pairs:
            move(old, torch.where(filled, batch, 0).sum(dim=0) / filled.sum(), step)
        return
    if plan.mode == "sync":
        # An empty rank learns what the others have seen; if all are empty, nothing.
        step = step * (values[0, 0] > 0)
        for old, batch in pairs:
            move(old, batch[0], step)
