"""The pool that runs the distributed tests is itself under test."""

import os
import time
import warnings
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from ranks import outcomes_on_ranks, restart, run_on_ranks


class NeedsTwoArguments(Exception):
    """Pickles, but can't be built again: its __init__ wants more than what it kept in args."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def rank_and_size() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def process_id() -> int:
    return os.getpid()


def sum_over_ranks(factor: float, *, shift: float = 0.0) -> torch.Tensor:
    total = torch.tensor([factor * (dist.get_rank() + 1) + shift])
    dist.all_reduce(total)
    return total


def tensor_with_a_graph() -> torch.Tensor:
    return torch.ones(3, requires_grad=True) * (dist.get_rank() + 1)


def draw() -> float:
    return torch.rand(()).item()


def threads() -> int:
    return torch.get_num_threads()


def warn() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def ignore_warnings() -> None:
    warnings.simplefilter("ignore")


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} does not like it")
    return dist.get_rank()


def fail_everywhere() -> NoReturn:
    time.sleep(0.2 * (2 - dist.get_rank()))
    raise KeyError(f"no key {dist.get_rank()}")


def fail_out_of_step() -> None:
    """Rank 0 has sent what rank 1 will never receive."""
    if dist.get_rank() == 0:
        dist.isend(torch.full((1,), 99.0), 1)
    raise ValueError("out of step")


def receive_from_rank_0() -> float:
    value = torch.full((1,), 1.0)
    if dist.get_rank() == 0:
        dist.send(value, 1)
    else:
        dist.recv(value.fill_(torch.nan), 0)
    return value.item()


def fail_unpicklably() -> NoReturn:
    raise NeedsTwoArguments("two ", "arguments")


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    time.sleep(600)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_in_the_order_of_the_ranks(world_size: int) -> None:
    expected = [(rank, world_size) for rank in range(world_size)]
    assert run_on_ranks(world_size, rank_and_size) == expected
    assert outcomes_on_ranks(world_size, rank_and_size) == expected


def test_ranks_talk_to_each_other_and_tensors_come_back() -> None:
    results = run_on_ranks(3, sum_over_ranks, 2.0, shift=1.0)
    torch.testing.assert_close(results, [torch.tensor([15.0])] * 3)


def test_a_tensor_with_a_graph_comes_back() -> None:
    first, second = run_on_ranks(2, tensor_with_a_graph)
    torch.testing.assert_close(first, torch.ones(3), check_stride=False)
    torch.testing.assert_close(second, torch.full((3,), 2.0))


def test_processes_are_kept_between_calls() -> None:
    assert run_on_ranks(2, process_id) == run_on_ranks(2, process_id)


def test_fresh_processes_are_others() -> None:
    kept = run_on_ranks(2, process_id)
    assert not set(run_on_ranks(2, process_id, fresh=True)) & {*kept, os.getpid()}
    assert run_on_ranks(2, process_id) == kept


def test_restart_gives_new_processes() -> None:
    old = run_on_ranks(1, process_id)
    restart(1)
    assert run_on_ranks(1, process_id) != old


def test_each_call_has_the_same_seed() -> None:
    """Else what a test draws depends on which tests ran before it."""
    assert run_on_ranks(2, draw) == run_on_ranks(2, draw)


def test_ranks_use_one_thread() -> None:
    assert run_on_ranks(2, threads) == [1, 1]


def test_a_warning_on_a_rank_is_an_error() -> None:
    with pytest.raises(UserWarning, match="careful"):
        run_on_ranks(2, warn)


def test_what_one_call_ignores_is_an_error_in_the_next() -> None:
    run_on_ranks(2, ignore_warnings)
    with pytest.raises(UserWarning, match="careful"):
        run_on_ranks(2, warn)


def test_an_exception_on_one_rank_surfaces_with_its_type() -> None:
    with pytest.raises(ValueError, match="rank 1 does not like it") as caught:
        run_on_ranks(2, fail_on, 1)
    assert caught.value.__notes__ == ["rank 1: ValueError: rank 1 does not like it"]
    assert "in fail_on" in str(caught.value.__cause__)


def test_the_exception_that_came_first_surfaces_with_all_as_notes() -> None:
    """Rank 1 fails before rank 0: the lowest rank's error may be a mere consequence."""
    with pytest.raises(KeyError) as caught:
        run_on_ranks(2, fail_everywhere)
    assert caught.value.args == ("no key 1",)
    assert caught.value.__notes__ == [
        "rank 0: KeyError: 'no key 0'",
        "rank 1: KeyError: 'no key 1'",
    ]


def test_outcomes_hold_results_and_exceptions() -> None:
    result, error = outcomes_on_ranks(2, fail_on, 1)
    assert result == 0
    assert isinstance(error, ValueError)
    assert str(error) == "rank 1 does not like it"


def test_a_failure_keeps_the_processes() -> None:
    kept = run_on_ranks(2, process_id)
    outcomes_on_ranks(2, fail_on, 0)
    assert run_on_ranks(2, process_id) == kept


def test_a_failure_leaves_no_message_to_the_next_call() -> None:
    """In the old group rank 1 would receive the 99 that it never picked up."""
    outcomes_on_ranks(2, fail_out_of_step)
    assert run_on_ranks(2, receive_from_rank_0) == [1.0, 1.0]


def test_an_exception_that_does_not_pickle_is_still_told() -> None:
    with pytest.raises(RuntimeError, match="NeedsTwoArguments: two arguments"):
        run_on_ranks(2, fail_unpicklably)


def test_a_hung_rank_ends_in_a_timeout_and_the_next_call_works() -> None:
    old = run_on_ranks(2, process_id)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"hang_on on 2 ranks: ranks \[1\] still busy after 0.5"):
        run_on_ranks(2, hang_on, 1, timeout=0.5)
    assert time.monotonic() - started < 5
    assert not set(run_on_ranks(2, process_id)) & set(old)


def test_a_dead_rank_ends_in_an_error_and_the_next_call_works() -> None:
    old = run_on_ranks(2, process_id)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"die_on on 2 ranks: .* ranks \[0\] died; ranks \[1\]"):
        outcomes_on_ranks(2, die_on, 0)
    assert time.monotonic() - started < 5
    assert not set(run_on_ranks(2, process_id)) & set(old)


def test_a_rank_that_dies_between_calls_is_told() -> None:
    """The call that finds out says so, and the one after it has new processes."""
    (worker,) = run_on_ranks(1, process_id)
    os.kill(worker, 9)
    time.sleep(0.5)  # so that the executor knows, and refuses the call
    with pytest.raises(RuntimeError, match=r"ranks \[0\] died"):
        run_on_ranks(1, process_id)
    assert run_on_ranks(1, process_id) != [worker]
