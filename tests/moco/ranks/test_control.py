"""What the ranks tell each other: one stop for all, one error for all, one order of a sum."""

from typing import Any

import torch
import torch.distributed as dist

from ranks import run_on_ranks
from shuffle_batchnorm.moco.config import ConfigError
from shuffle_batchnorm.moco.ranks.control import (
    StopAgreement,
    average_in_rank_order,
    on_rank_0,
    sum_over_ranks,
)
from shuffle_batchnorm.moco.ranks.launch import Rank


def this_rank() -> Rank:
    control = dist.new_group(backend="gloo")
    return Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), control=control)


def ask_until_stopped(signalled_rank: int) -> int:
    rank = this_rank()
    agreement = StopAgreement(rank)
    for step in range(10):
        if step == 4 and rank.index == signalled_rank:
            rank.stop.signum = 15
        if agreement.ask():
            agreement.answer()
            return step
    return -1


def test_ranks_stop_after_the_same_step() -> None:
    """A rank that stops when it hears the signal leaves its peers waiting."""
    assert run_on_ranks(3, ask_until_stopped, 1) == [5, 5, 5]


def fail_on_rank_0() -> str:
    def fail() -> None:
        raise ConfigError("wrong")

    rank = this_rank()
    try:
        on_rank_0(rank, fail)
    except ConfigError as error:
        total = sum_over_ranks(rank, torch.tensor([1.0 + rank.index]))
        return f"{error}, {on_rank_0(rank, lambda: rank.index)}, {total}"
    return "no error"


def test_all_ranks_learn_of_rank_0s_error() -> None:
    assert run_on_ranks(3, fail_on_rank_0) == ["wrong, 0, [6.0]"] * 3


class Bucket:
    """A bucket of gradients, as DistributedDataParallel hands it to a hook."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self.buffer = lambda: gradients


def average(gradients: list[list[float]]) -> list[float]:
    own: Any = Bucket(torch.tensor(gradients[dist.get_rank()]))
    averages: list[float] = average_in_rank_order(None, own).wait().tolist()
    return averages


def test_gradients_are_averaged_in_the_order_of_the_ranks() -> None:
    """Catches another order, which gives other last bits; 4 numbers, which 3 ranks don't divide."""
    gradients = [[1e8, 1.0, 3.0, -6.0], [1.0, 2.0, 3.0, 6.0], [-1e8, 3.0, 3.0, 3.0]]
    expected = [0.0, 2.0, 3.0, 1.0]  # in float32 1e8 + 1 is 1e8; (1e8 - 1e8) + 1 would be 1
    assert run_on_ranks(3, average, gradients) == [expected] * 3
