"""One agreement for layers, shuffles and probes: ranks compare a kind of call once, then trust it.

All ranks compare what they must have in common at their first call of a kind, and all raise if one
can't go on. Later calls of that kind send nothing but their data.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from . import collectives, failures
from .world import World, default_device

ANSWER_BYTES = 2048
# Characters: each takes 6 bytes of JSON at most, and the numbers and hashes need room as well.
_QUOTE = 200
_PART = ANSWER_BYTES // 4
_MOST_KINDS = 4096

_kinds: WeakKeyDictionary[Any, dict[Hashable, list[Any]]] = WeakKeyDictionary()


def recall(world: World, kind: Hashable) -> list[Any] | None:
    """Return what `agree` returned for a kind of call in this group; None if it is a new one."""
    return _kinds[world.group].get(kind) if world.group in _kinds else None


def remember(world: World, kind: Hashable, answers: list[Any]) -> None:
    """Trust a kind of call from now on; all ranks do so at the same call."""
    if world.size == 1:
        return
    kinds = _kinds.setdefault(world.group, {})
    if len(kinds) >= _MOST_KINDS:
        kinds.clear()
    kinds[kind] = answers


def agree(
    call: str,
    terms: Mapping[str, object],
    error: Exception | None,
    world: World,
    own: Any = None,
) -> list[Any]:
    """Compare what all ranks must have in common, and return what each has of its own.

    Communication: one all_gather of 2 KiB per rank; before an error that shows a difference,
    further ones until it has been found.

    Args:
        call: names the call in an error.
        terms: by name, what has to be the same on all ranks, as ``str`` shows it.
        error: why this rank can't go on.
        world: the ranks.
        own: a few numbers that may differ between ranks.

    Returns:
        Every rank's `own`, in rank order.

    Raises:
        Exception: `error` on the rank that has one; RuntimeError that quotes it on its peers;
            ValueError on all ranks if they differ; RuntimeError in a DDP ``join()``.
    """
    if world.size == 1:
        if error is not None:
            raise error
        return [own]
    if reason := failures.find_join():  # said at the first call, not when the inputs end
        failures.announce(world, reason)
        raise RuntimeError(f"{call}: {reason}")
    refusal = None if error is None else str(error)[:_QUOTE]
    hashes = {name: _hash(term) for name, term in terms.items()}
    header = json.dumps([call, refusal, own, hashes])
    answers = [json.loads(text) for text in _gather(header, call, world)]
    if error is not None:
        raise error
    for rank, (_, refused, _, _) in enumerate(answers):
        if refused is not None:
            raise RuntimeError(f"{call}: rank {rank} rejected its input: {refused}")
    for rank, (other, *_) in enumerate(answers):
        if other != answers[0][0]:
            raise ValueError(
                f"{call}: ranks are at different calls: rank 0 at {answers[0][0]}, rank {rank} at "
                f"{other}"
            )
    for name in terms:
        for rank, (*_, theirs) in enumerate(answers):
            if theirs[name] != answers[0][3][name]:
                _raise_difference(call, name, str(terms[name]), rank, world)
    return [answer[2] for answer in answers]


def _raise_difference(call: str, name: str, term: str, other: int, world: World) -> None:
    """Show on which part of a term a rank differs from rank 0."""
    start = 0
    parts = _gather(term[:_PART], call, world)
    while parts[0] and parts[0] == parts[other]:  # long, and alike so far
        start += _PART
        parts = _gather(term[start : start + _PART], call, world)
    before = "... " if start else ""
    raise ValueError(
        f"{call}: ranks disagree on {name}: {before}{parts[0]} on rank 0, {before}{parts[other]} "
        f"on rank {other}"
    )


def _hash(term: object) -> str:
    return hashlib.blake2b(str(term).encode(), digest_size=8).hexdigest()


def _gather(text: str, call: str, world: World) -> list[str]:
    """Return what every rank has to say, at most `ANSWER_BYTES` of it, in rank order."""
    padded = bytearray(text.encode()[:ANSWER_BYTES].ljust(ANSWER_BYTES))
    row = torch.frombuffer(padded, dtype=torch.uint8).to(default_device(world))
    rows = collectives.all_gather(row, world, call, f"compares its {call} with its peers'")
    return [bytes(other).decode(errors="ignore").rstrip() for other in rows.tolist()]
