"""What a rank checks alone before it communicates, and once with its peers."""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm import collectives, failures
from shuffle_batchnorm.comm.world import CALL, World
from shuffle_batchnorm.kernels.rows import accumulation_dtype

from .mixing import Options


class Wire(NamedTuple):
    """The form of the rows that ranks exchange."""

    channels: int
    dtype: torch.dtype


# What the ranks of process groups, by their serial numbers, have found that they have in common.
Agreed = set[tuple[int, Options, Wire]]


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


def wire_of(input: Tensor, parameters: dict[str, Tensor | None], num_features: int | None) -> Wire:
    """Return the form of a call's rows, as well as it can be told from an input that may be bad.

    The layer is believed before the input, so that a bad input is rejected in the form that the
    peers expect.
    """
    known = [p for p in parameters.values() if p is not None]
    dtype = accumulation_dtype(known[0] if known else input) if known or _is_tensor(input) else None
    channels = num_features or next((p.shape[0] for p in known if p.ndim == 1), 0)
    if not channels and _is_tensor(input) and input.ndim > 1:
        channels = input.shape[1]
    return Wire(channels, dtype or torch.float32)


def _is_tensor(input: object) -> bool:
    return isinstance(input, Tensor)


def agree(
    world: World,
    options: Options,
    wire: Wire,
    dtype: str,
    error: Exception | None,
    agreed: Agreed,
    device: torch.device,
) -> None:
    """Check once, at the first training call of a kind, that all ranks call alike.

    Communication: one all_gather of 2 KiB per rank, at the first call in this process group with
    these options and this form of rows only; none in `local`, which leaves a note in the group's
    store for peers in another mode.

    Raises:
        Exception: `error` on the rank that has one; RuntimeError that quotes it on its peers;
            ValueError on all ranks if they disagree.
    """
    key = (failures.serial(world), options, wire)
    if options.mode == "local":
        failures.note_local(world, wire.channels)
    else:
        terms = {"channels": wire.channels, "dtype": dtype, **options._asdict()}
        refusal = (
            None if error is None else str(error).encode()[:_QUOTE_BYTES].decode(errors="ignore")
        )
        answer = json.dumps([terms, refusal]).encode()
        answers = collectives.gather_answers(answer, wire.channels, device, world)
        if error is None:
            _compare([_parse(text) for text in answers])
    if error is not None:
        raise error
    agreed.add(key)


def _parse(answer: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        terms, refusal = json.loads(answer)
    except ValueError as error:
        raise RuntimeError(
            f"{CALL}: ranks are not at the same call: one compares options, another exchanges "
            "statistics"
        ) from error
    return terms, refusal


def _compare(answers: list[tuple[dict[str, Any], str | None]]) -> None:
    for rank, (_, refusal) in enumerate(answers):
        if refusal is not None:
            raise RuntimeError(f"{CALL}: rank {rank} rejected its input: {refusal}")
    for name in answers[0][0]:
        values = [terms[name] for terms, _ in answers]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{CALL}: ranks disagree on {name}: {values[0]!r} on rank 0, "
                f"{values[other]!r} on rank {other}"
            )


# At most six bytes of JSON each, which leaves room for the terms in collectives.ANSWER_BYTES.
_QUOTE_BYTES = 300
