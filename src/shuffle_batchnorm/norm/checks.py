"""What a call of the layer has to be, what ranks must have in common, and how one refuses."""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from shuffle_batchnorm.comm import agreement, failures
from shuffle_batchnorm.comm.world import ProcessGroupLike, World, resolve
from shuffle_batchnorm.kernels import select
from shuffle_batchnorm.kernels.rows import accumulation_dtype

from .mixing import CALL, Options, Plan, check_options, make_plan
from .statistics import Call, RowFormat, asks_peers, mix, prepare_call, rejection
from .tracing import warn

CheckDimensions = Callable[[Tensor], None]


class Parameters(NamedTuple):
    """What a layer has besides its options, each ``[C]`` or None."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


def check_input(
    input: Tensor,
    parameters: Parameters,
    groups: int,
    num_features: int | None,
    check_dimensions: CheckDimensions | None,
) -> None:
    """Raise what makes one rank's input unacceptable, whatever its peers have."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        kind = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"{CALL}: input must be a floating-point tensor, got {kind}")
    shape = tuple(input.shape)
    if input.ndim < 2:
        raise ValueError(
            f"{CALL}: expected an input [N, C, *] of at least 2 dimensions, got {input.ndim} "
            f"(input shape {shape})"
        )
    if check_dimensions is not None:
        check_dimensions(input)
    if num_features is not None and shape[1] != num_features:
        raise ValueError(
            f"{CALL}: input has {shape[1]} channels, the layer has num_features={num_features} "
            f"(input shape {shape})"
        )
    for name, parameter in parameters._asdict().items():
        if parameter is None:
            continue
        if parameter.shape != (shape[1],):
            raise ValueError(
                f"{CALL}: input has {shape[1]} channels, {name} has shape "
                f"{tuple(parameter.shape)} (input shape {shape})"
            )
        if parameter.device != input.device:
            raise ValueError(f"{CALL}: input is on {input.device}, {name} on {parameter.device}")
        if accumulation_dtype(parameter) != accumulation_dtype(input):
            raise ValueError(f"{CALL}: input is {input.dtype}, {name} is {parameter.dtype}")
    if (parameters.running_mean is None) != (parameters.running_var is None):
        raise ValueError(
            f"{CALL}: running_mean and running_var must be given together or not at all"
        )
    if shape[0] % groups:
        raise ValueError(
            f"{CALL}: batch {shape[0]} is not divisible by groups={groups} (input shape {shape})"
        )


def check_eps(eps: Any) -> None:
    """Raise a ValueError unless `eps` is positive."""
    if not isinstance(eps, Real):
        raise TypeError(f"{CALL}: eps must be a number, got {eps!r}")
    if not float(eps) > 0:
        raise ValueError(f"{CALL}: eps must be positive when training, got eps={eps}")


def check_local(input: Any, parameters: Parameters) -> None:
    """Raise a TypeError for tensors that are shards: ranks exchange statistics here."""
    for name, tensor in (("input", input), *parameters._asdict().items()):
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{CALL}: {name} is a DTensor; pass this rank's part of it, {name}.to_local(), "
                "and leave the layer out of distribute_module"
            )


def check_or_announce(options: Options, world: World) -> None:
    """Raise what is wrong with options, and let peers that wait for this rank know."""
    try:
        check_options(CALL, options)
    except (TypeError, ValueError) as error:
        if not torch.compiler.is_compiling():
            failures.announce(world, str(error))
        raise


def agree_once(options: Options, call: Call, world: World) -> None:
    """Compare a call of a new kind with those of all ranks: options, channels and dtype.

    Communication: that of `agreement.agree`, once in a process group.

    Raises:
        RuntimeError: a peer can't accept its input.
        ValueError: ranks disagree.
    """
    if not asks_peers(call.plan) or torch.compiler.is_compiling():
        return
    if agreement.recall(world, (CALL, options, call.row_format)) is None:
        _agree(options, call.row_format, None, world)


def _agree(options: Options, row_format: RowFormat, error: Exception | None, world: World) -> None:
    channels, dtype = row_format
    terms = {"channels": channels, "dtype": dtype, **options._asdict()}
    agreement.agree(CALL, {name: repr(term) for name, term in terms.items()}, error, world)
    agreement.remember(world, (CALL, options, row_format), [])


def refuse(
    error: Exception,
    input: Any,
    parameters: Parameters,
    options: Options,
    world: World,
    num_features: int | None,
) -> NoReturn:
    """Raise why this rank can't accept its input, and let its peers know."""
    plan = make_plan(options, world.size, world.rank)
    if asks_peers(plan) and not torch.compiler.is_compiling():
        row_format = _expected_format(input, parameters, num_features)
        if agreement.recall(world, (CALL, options, row_format)) is None:
            _agree(options, row_format, error, world)
        _reject(plan, row_format, input, parameters, world)
        failures.announce(world, str(error))
    raise error


def _reject(
    plan: Plan, row_format: RowFormat, input: Any, parameters: Parameters, world: World
) -> None:
    """Take part in the exchange for which the peers are here, so that they learn of it."""
    tensors = [t for t in (input, *parameters) if isinstance(t, Tensor)]
    device = tensors[-1].device if tensors else torch.device("cpu")
    rows = rejection(plan, row_format, device)
    mix(rows, prepare_call(plan, (), row_format, select.select(rows)), world)


def _expected_format(input: Any, parameters: Parameters, num_features: int | None) -> RowFormat:
    """Return the form of the peers' rows, as well as it can be told from an input that may be bad.

    The layer is believed before the input.
    """
    known = [p for p in parameters if p is not None]
    is_tensor = isinstance(input, Tensor)
    source = known[0] if known else input if is_tensor else None
    channels = num_features or next((p.shape[0] for p in known if p.ndim == 1), 0)
    if not channels and is_tensor and input.ndim > 1:
        channels = input.shape[1]
    return RowFormat(channels, torch.float32 if source is None else accumulation_dtype(source))


def warn_of_few_groups(options: Options, process_group: ProcessGroupLike) -> None:
    """Warn if a converted model has a single group to shuffle, or ranks with few in `regroup`."""
    mode, groups, offset, blocks = options
    ranks = resolve(process_group, CALL).size
    total = ranks * groups
    if mode not in ("swap", "regroup") or offset == 0:
        return
    cure = f"groups={-(-8 // ranks)} cuts each rank's batch into virtual groups"
    if total == 1:
        warn(
            f"one rank with groups=1 is a single group, so mode {mode!r} shuffles nothing; {cure}, "
            "and a process group of several ranks shuffles among them"
        )
    elif ranks > 1 and mode == "regroup" and total < min(8, blocks):
        warn(
            f"{ranks} ranks with groups={groups} are {total} groups, so mode 'regroup' leaves "
            f"1/{total} of the samples that a sample was normalised with together; {cure}"
        )


def warn_if_nothing_is_shuffled(options: Options, plan: Plan) -> None:
    """Warn if there are groups to shuffle among, and the options leave each to itself."""
    asked = options.mode in ("swap", "regroup") and options.offset != 0
    if not asked or plan.total_groups == 1 or plan.shuffles:
        return
    cause = f"offset={options.offset} is a multiple of the {plan.total_groups} groups"
    if options.offset % plan.total_groups:
        cause = f"blocks={options.blocks} leaves each group whole"
    warn(f"{cause}, so mode {options.mode!r} shuffles nothing")
