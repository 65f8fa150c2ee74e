"""shuffle_batch_norm: moments of blocks, mix, per-block affine; and its backward."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from shuffle_batchnorm.comm.recomputation import Forwards
from shuffle_batchnorm.comm.world import (
    ProcessGroupLike,
    World,
    check_process_group,
    resolve,
)
from shuffle_batchnorm.kernels import select
from shuffle_batchnorm.kernels.rows import (
    Running,
    accumulation_dtype,
    are_equal,
    counts,
    is_known,
    move,
    unbiased_variance,
)

from .autograd import Normalise
from .checks import (
    CheckDimensions,
    Parameters,
    agree_once,
    check_eps,
    check_input,
    check_local,
    check_or_announce,
    refuse,
    warn_if_nothing_is_shuffled,
)
from .mixing import CALL, Options, Plan, check_options, make_plan
from .statistics import (
    Call,
    RowFormat,
    Statistics,
    check_counts,
    prepare_call,
    statistics_of,
)
from .tracing import check_no_transform, count_batch


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
    sample's own group i; in ``"sync"`` all samples; in ``"swap"`` group
    ``(i + offset) mod G``; in ``"regroup"`` the new group ``(i + offset * c) mod G``, where c is
    the sample's block among the ``B = min(G, blocks)`` contiguous blocks of its group, and a new
    group is the B blocks that join it.

    In eval mode (``training=False``) this is ``torch.nn.functional.batch_norm``.

    Communication:
        Per rank, forward ``[count, mean, std]`` rows of 2C + 1 numbers, backward rows of 2C
        numbers, in float32 (float64 for float64 input), in one message. ``local``: none. ``swap``:
        at most `groups` rows to at most two fixed ranks. ``regroup``: each row to the ranks that
        use its new group, for ``groups=1`` at most ``B * B - B`` rows to ``min(2 * B - 2, W - 1)``
        fixed ranks, else at most ``groups * B * (min(B, W) - 1)`` rows. ``sync``: one row to all
        (all_gather) forward, one all_reduce backward. The first training call with other options,
        channels or dtype also compares these with all ranks' (2 KiB per rank).

    Args:
        input: ``[N, C, *]``, floating point; N, and each space axis, may differ between ranks.
        running_mean: ``[C]`` or None, updated in place when training.
        running_var: ``[C]`` or None, unbiased, updated in place when training.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        training: normalise with batch statistics; otherwise with the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance; positive when training.
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
            or channels, `eps` not positive, an unknown option, or ranks that disagree; on every
            rank at the first call. Later, the peers of a rank that rejects its input get a
            RuntimeError.
        TypeError: an input that is not floating point or a DTensor, an option of another type.

    Warns:
        UserWarning: `offset` is a multiple of ``G > 1``, so nothing is shuffled.

    Source:
        Shuffling BN: He et al. 2019, arXiv 1911.05722, section 3.3 and appendix A.9.

    Example:
        >>> x = torch.arange(4.0).view(4, 1)
        >>> y = shuffle_batch_norm(x, None, None, training=True, groups=2, eps=1e-12)
        >>> y.flatten().tolist()
        [-5.0, -3.0, 3.0, 5.0]
    """
    options = Options(mode, groups, offset, blocks)
    check_process_group(CALL, process_group)
    if not training:
        check_options(CALL, options)
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    buffers = (running_mean, running_var)
    if isinstance(running_mean, Tensor) and not torch.compiler.is_compiling():
        owner = running_mean if running_mean._base is None else running_mean._base
        if owner not in _forwards:
            _forwards[owner] = Forwards()
        kind = kind_of(input), running_mean.storage_offset()
        moves, _ = _forwards[owner].begin(kind, tracked=True)
        buffers = buffers if moves else (None, None)
    parameters = Parameters(weight, bias, *buffers)
    return normalise(input, parameters, None, momentum, eps, options, process_group, _calls).output


Calls = dict[Any, Call]
_calls: Calls = {}
_MOST_CALLS = 256
# By the running mean, or what it is a view of, which calls with the same statistics share.
_forwards = WeakIdKeyDictionary()


def kind_of(input: Any) -> Hashable:
    """Return what a forward pass and its repetition have in common."""
    return input.shape if type(input) is Tensor else None


class Normalised(NamedTuple):
    """The output of a training call, and the statistics behind it."""

    output: Tensor
    statistics: Statistics
    sizes: tuple[int, ...]


def normalise(
    input: Tensor,
    parameters: Parameters,
    num_batches_tracked: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    options: Options,
    process_group: ProcessGroupLike,
    calls: Calls,
    num_features: int | None = None,
    check_dimensions: CheckDimensions | None = None,
) -> Normalised:
    """Normalise with batch statistics and update the running ones. See `shuffle_batch_norm`.

    What is prepared for a kind of call is kept in `calls`.
    """
    if not torch.compiler.is_compiling():
        check_no_transform(input)
    world = resolve(process_group, CALL)
    call = _find_call(input, parameters, eps, options, world, calls, num_features, check_dimensions)
    agree_once(options, call, world)
    weight, bias, running_mean, running_var = parameters
    with torch.no_grad():
        statistics = statistics_of(input, call, world)  # moments and mix
        check_counts(statistics, call, world, input.shape)
        running = None
        if running_mean is not None and running_var is not None:
            running = Running(running_mean, running_var, momentum)
        # Before what follows, which a checkpoint may leave when it has what it needs.
        if num_batches_tracked is not None:
            count_batch(num_batches_tracked)
        elif running is not None:
            count_batch(running.mean, 0)
        rstd, scale = _normaliser_rows(statistics, input, weight, eps, running, call)
        source: tuple[Tensor, ...] | tuple[None, ...] = (None, None, None)
        if statistics.source is not None:
            count, mean, std = statistics.source
            source_rstd, _ = call.kernels.normaliser_rows(mean, std, None, eps, count, None)
            source = (count, mean, source_rstd)
    output = Normalise.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, statistics.counts, statistics.mean, rstd,
        None if weight is None else scale,  # a compiler refuses the same tensor twice
        *source, call, world,
    )  # fmt: skip
    return Normalised(output, statistics, call.sizes)


def _find_call(
    input: Tensor,
    parameters: Parameters,
    eps: float,
    options: Options,
    world: World,
    calls: Calls,
    num_features: int | None,
    check_dimensions: CheckDimensions | None,
) -> Call:
    """Return what has been prepared for a kind of call; or check a new kind, and prepare it.

    Raises:
        ValueError: the input doesn't fit the rule; the peers know.
        TypeError: likewise.
    """
    # Fake and other special tensors may have sizes that are symbols, which have no hash.
    can_keep = not torch.compiler.is_compiling() and type(input) is Tensor
    key: Any = None
    if can_keep:
        tensors = input, *parameters
        forms = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        key = options, eps, world.rank, world.size, *forms
        if key in calls:
            return calls[key]
    check_or_announce(options, world)
    try:
        check_eps(eps)
        check_local(input, parameters)
        check_input(input, parameters, options.groups, num_features, check_dimensions)
    except (TypeError, ValueError) as error:
        refuse(error, input, parameters, options, world, num_features)
    plan = make_plan(options, world.size, world.rank)
    warn_if_nothing_is_shuffled(options, plan)
    batch = input.shape[0]
    if world.size == 1 and is_known(batch // plan.groups < plan.per_group):
        # Ranks keep theirs: a peer with a larger batch has samples in blocks that are empty here.
        # So does a graph for batches of any size.
        plan = plan.without_empty_blocks(batch)
    row_format = RowFormat(input.shape[1], accumulation_dtype(input))
    call = prepare_call(plan, plan.sizes(batch), row_format, select.select(input))
    if can_keep:
        if len(calls) >= _MOST_CALLS:
            calls.clear()
        calls[key] = call
    return call


def _normaliser_rows(
    statistics: Statistics,
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    running: Running | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Return ``rstd = 1 / sqrt(std**2 + eps)`` and ``rstd * weight``; move running statistics."""
    count, mean, std = statistics[:3]
    if isinstance(count, Tensor) and running is not None:
        sizes = call.sizes if input.shape[2:].numel() > 0 else (0,) * len(call.sizes)
        if not are_equal(sizes) or sizes[0] == 0:
            _move_running(running, count, statistics, sizes, call.plan)
            running = None
    # Else each normaliser has as many blocks here, so their average is that over the blocks.
    rstd, scale = call.kernels.normaliser_rows(mean, std, weight, eps, count, running)
    return rstd, scale


def _move_running(
    running: Running, count: Tensor, statistics: Statistics, sizes: tuple[int, ...], plan: Plan
) -> None:
    """Move the running statistics towards those used, averaged over the blocks with samples.

    In `regroup` the mean over all ranks of these averages is the average over all new groups.
    """
    var = unbiased_variance(statistics.std, count)
    # In sync an empty rank learns what the others have seen.
    filled = count > 0 if plan.mode == "sync" else counts(sizes, 1, count) > 0
    number = filled.sum()
    step = running.step * (number > 0).to(count.dtype)
    for old, batch in ((running.mean, statistics.mean), (running.var, var)):
        move(old, torch.where(filled, batch, 0).sum(dim=0) / number.clamp(min=1), step)
