"""DDP's `join()` around a model that exchanges statistics or samples: an error, not a wait."""

import re
import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ranks import impatient, new_group, run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, ShuffledEncoder

ENDED = (
    "in DDP's join() a rank that has run out of inputs does not take part in this exchange, and "
    "its peers would wait for it; call join(throw_on_early_termination=True)"
)
CALLS = {
    "sync": "shuffle_batch_norm",
    "regroup": "shuffle_batch_norm",
    "batch_shuffle": "batch_shuffle",
}
LIMIT = timedelta(seconds=4)  # of what an exhausted rank waits for once its peers have raised


def _model(kind: str) -> DistributedDataParallel:
    group = new_group()
    if kind == "batch_shuffle":
        net: nn.Module = ShuffledEncoder(nn.BatchNorm1d(4), process_group=group)
    else:
        net = ShuffleBatchNorm(4, mode=kind, process_group=group)
    model = DistributedDataParallel(net, process_group=group)
    dist.barrier(group)
    dist.distributed_c10d._set_pg_timeout(LIMIT, group)
    return model


def _train(model: nn.Module, steps: int) -> int:
    for _ in range(steps):
        model(torch.randn(6, 4)).square().mean().backward()
    return steps


def _join(kind: str, before: int, inputs: list[int], **options: Any) -> tuple[str, float]:
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Detected uneven input skew")
    model = _model(kind)
    start = time.monotonic()
    with impatient():
        try:
            _train(model, before)
            with model.join(**options):
                _train(model, inputs[dist.get_rank()])
        except RuntimeError as error:
            return str(error), time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize("inputs", [[1, 2], [2, 2], [3, 2, 1]], ids=str)
@pytest.mark.parametrize("kind", CALLS)
def test_join_is_refused_at_the_first_call(kind: str, inputs: list[int]) -> None:
    """Catches a run that waits for the time limit as soon as a rank has no inputs left."""
    for text, _ in run_on_ranks(len(inputs), _join, kind, 0, inputs):
        assert re.fullmatch(rf"{CALLS[kind]}[^:]*: {re.escape(ENDED)}", text)


@pytest.mark.parametrize(
    ("kind", "inputs"), [("regroup", [0, 1]), ("batch_shuffle", [1, 0, 1])], ids=str
)
def test_a_rank_without_inputs_is_not_waited_for(kind: str, inputs: list[int]) -> None:
    """Catches an error that has to be agreed on with the rank that isn't there."""
    results = run_on_ranks(len(inputs), _join, kind, 0, inputs)
    for steps, (text, seconds) in zip(inputs, results, strict=True):
        assert (ENDED in text) == (steps > 0)
        assert steps == 0 or seconds < LIMIT.total_seconds()


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("sync", [1, 2]), ("regroup", [1, 1, 2]), ("batch_shuffle", [1, 2])],
    ids=str,
)
def test_join_after_calls_of_this_kind_is_told_by_those_who_wait(
    kind: str, inputs: list[int]
) -> None:
    """Catches silence where ranks had agreed before, and compare nothing again."""
    *ended, (text, seconds) = run_on_ranks(len(inputs), _join, kind, 1, inputs)
    assert re.fullmatch(rf"{CALLS[kind]}[^:]*: {re.escape(ENDED)}", text)
    assert seconds < LIMIT.total_seconds()
    for other, _ in ended:
        assert ENDED not in other


@pytest.mark.parametrize("kind", CALLS)
def test_ranks_that_throw_end_together(kind: str) -> None:
    """Catches a refusal of the option that the error recommends."""
    options = {"throw_on_early_termination": True}
    first, second = run_on_ranks(2, _join, kind, 0, [1, 2], **options)
    assert first[0] == "Rank 0 exhausted all inputs."
    assert second[0].startswith("Detected at least one rank that exhausted inputs.")


@pytest.mark.parametrize("kind", CALLS)
def test_a_join_that_is_switched_off_is_none(kind: str) -> None:
    for text, _ in run_on_ranks(2, _join, kind, 0, [2, 2], enable=False):
        assert text == ""
