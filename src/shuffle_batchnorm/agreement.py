"""What a rank checks alone before it communicates, and once with its peers."""

import json
from typing import NamedTuple

import torch
from torch import Tensor

from . import exchange
from .exchange import CALL, World
from .kernels.rows import accumulation_dtype
from .mixing import Options


class Terms(NamedTuple):
    """What all ranks must have in common when they call a layer; the names are for the error."""

    channels: int
    dtype: str
    mode: str
    groups: int
    offset: int
    blocks: int
    needs_gradient: bool


class Wire(NamedTuple):
    """The form of the rows that the ranks have agreed to exchange."""

    channels: int
    dtype: torch.dtype


# Per process group and options, what its ranks have agreed on.
Agreed = dict[tuple[str, Options], Wire]


def check_input(
    input: Tensor, parameters: dict[str, Tensor | None], groups: int, num_features: int | None
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
    if num_features is not None and shape[1] != num_features:
        raise ValueError(
            f"{CALL}: input has {shape[1]} channels, the layer has num_features={num_features} "
            f"(input shape {shape})"
        )
    for name, parameter in parameters.items():
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
    if (parameters.get("running_mean") is None) != (parameters.get("running_var") is None):
        raise ValueError(
            f"{CALL}: running_mean and running_var must be given together or not at all"
        )
    if shape[0] % groups:
        raise ValueError(
            f"{CALL}: batch {shape[0]} is not divisible by groups={groups} (input shape {shape})"
        )


def agree(
    world: World,
    options: Options,
    terms: Terms,
    error: Exception | None,
    agreed: Agreed,
    device: torch.device,
) -> Wire:
    """Check once, at the first training forward, that all ranks call alike; return their rows.

    Communication: one all_gather of 1 KiB per rank, at the first call with these options only;
    none in `local`, which leaves a note in the group's store for peers in another mode.

    Raises:
        Exception: `error` on the rank that has one; RuntimeError that quotes it on its peers;
            ValueError on all ranks if they disagree.
    """
    key = (world.name, options)
    if key in agreed:
        return agreed[key]
    wire = Wire(terms.channels, _WIRE_DTYPES.get(terms.dtype, torch.float32))
    if options.mode == "local":
        exchange.note_local(world)
    else:
        refusal = None if error is None else str(error)[:_LONGEST_QUOTE]
        answer = json.dumps([terms, refusal]).encode()
        answers = [json.loads(a) for a in exchange.gather_answers(answer, device, world)]
        if error is None:
            _compare([Terms(*terms) for terms, _ in answers], [refusal for _, refusal in answers])
    if error is not None:
        raise error
    agreed[key] = wire
    return wire


def _compare(terms: list[Terms], refusals: list[str | None]) -> None:
    for rank, refusal in enumerate(refusals):
        if refusal is not None:
            raise RuntimeError(f"{CALL}: rank {rank} rejected its input: {refusal}")
    for name in Terms._fields:
        values = [getattr(term, name) for term in terms]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{CALL}: ranks disagree on {name}: {values[0]!r} on rank 0, "
                f"{values[other]!r} on rank {other}"
            )


_WIRE_DTYPES = {str(torch.float64): torch.float64}
_LONGEST_QUOTE = 500  # characters; keeps an answer under exchange.ANSWER_BYTES in any script
