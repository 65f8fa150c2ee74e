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
from shuffle_batchnorm.kernels.local import Rows
from shuffle_batchnorm.kernels.rows import Running, accumulation_dtype, is_known, per_sample, take

from .among_ranks import AmongRanks, PreparedRanks
from .autograd import Normalise, apply_directly
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
from .mixing import CALL, Options, check_options, make_plan
from .statistics import Call, RowFormat, asks_peers, prepare_call, prepare_local, prepare_ranks
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
    """The output of a training call, and what is behind it."""

    output: Tensor
    call: Call
    work: Any
    rows: Rows
    std: Tensor | None

    def per_sample(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and std ``[N, C]`` that normalised each sample of the input."""
        mean, std = (
            per_sample(take(rows, self.call.used), self.call.sizes)
            for rows in self.work.moments(input.detach(), self.rows, self.std)
        )
        return mean, std


def normalise(
    input: Tensor,
    parameters: Parameters,
    number: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    options: Options,
    process_group: ProcessGroupLike,
    calls: Calls,
    num_features: int | None = None,
    check_dimensions: CheckDimensions | None = None,
) -> Normalised:
    """Normalise with batch statistics and update the running ones. See `shuffle_batch_norm`.

    What is prepared for a kind of call is kept in `calls`; `number` counts batches.
    """
    is_eager = not torch.compiler.is_compiling()
    if is_eager:
        check_no_transform(input)
    world = resolve(process_group, CALL)
    call: Call | None = None
    key: Any = None
    # Fake and other special tensors may have sizes that are symbols, which have no hash.
    if is_eager and type(input) is Tensor:
        tensors = input, *parameters, number
        forms = [
            x if x is None else (type(x), x.shape, x.stride(), x.dtype, x.device) for x in tensors
        ]
        # A momentum in memory takes another kernel.
        key = options, eps, isinstance(momentum, Tensor), world.rank, world.size, *forms
        call = calls.get(key)
    if call is None:
        call = _prepare(
            input, parameters, number, eps, options, world, num_features, check_dimensions
        )
        if key is not None:
            if len(calls) >= _MOST_CALLS:
                calls.clear()
            calls[key] = call
    work = call.local
    if work is None:
        agree_once(options, call, world)
        has_prepared = call.ranks is not None
        work = PreparedRanks(call, world) if has_prepared else AmongRanks(call, world, eps)
    weight, bias, mean, var = parameters
    running = None if mean is None or var is None else Running(mean, var, momentum, number)
    rows, std = work.statistics(input, weight, running)
    if not call.moves_later:  # before what follows, which a checkpoint may leave early
        if number is not None:
            count_batch(number)
        elif running is not None:
            count_batch(running.mean, 0)
    apply = apply_directly if is_eager else Normalise.apply
    output = apply(input, weight, bias, work, running if call.moves_later else None, *rows)
    return Normalised(output, call, work, rows, std)


def _prepare(
    input: Tensor,
    parameters: Parameters,
    number: Tensor | None,
    eps: float,
    options: Options,
    world: World,
    num_features: int | None,
    check_dimensions: CheckDimensions | None,
) -> Call:
    """Check a new kind of call, and prepare it.

    Raises:
        ValueError: the input doesn't fit the rule; the peers know.
        TypeError: likewise.
    """
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
    row_format = RowFormat(input.shape[1], accumulation_dtype(input))
    if asks_peers(plan):
        call = prepare_call(plan, plan.sizes(batch), row_format, select.select(input))
        return prepare_ranks(call, input, eps, (*parameters, number))
    if world.size == 1 and is_known(batch // plan.groups < plan.per_group):
        # A graph for batches of any size keeps them.
        plan = plan.without_empty_blocks(batch)
    return prepare_local(plan, input, eps, row_format, (*parameters, number))
