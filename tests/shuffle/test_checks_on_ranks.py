"""What one rank can't accept, or does differently, ends every rank at once with a clear error."""

import re
import time
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranks import run_on_ranks
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    batch_shuffle,
    batch_unshuffle,
    set_shuffle_state,
)
from shuffle_batchnorm.comm import failures
from shuffle_batchnorm.shuffle.permutations import Key, make_route
from shuffle_batchnorm.shuffle.plan import ShufflePlan

SECONDS = 1.5  # less than the patience of a waiting rank: the header told it


def _x(n: int = 6) -> Tensor:
    return torch.randn(n, 2)


def _scalar(bad: bool) -> Any:
    return batch_shuffle(torch.tensor(1.0) if bad else _x())


def _text(bad: bool) -> Any:
    return batch_shuffle({"x": _x(), "name": "a" if bad else None})


def _nothing(bad: bool) -> Any:
    return batch_shuffle([] if bad else _x())


def _sizes(bad: bool) -> Any:
    return batch_shuffle([_x(), _x(5 if bad else 6)])


def _features_of_another_size(bad: bool) -> Any:
    return batch_unshuffle(_x(5 if bad else 6), batch_shuffle(_x())[1])


def _plan_of_another_size(bad: bool) -> Any:
    plan = batch_shuffle(_x())[1]
    return batch_shuffle(_x(5 if bad else 6), plan=plan)


def _twice(bad: bool) -> Any:
    shuffled, plan = batch_shuffle(_x())
    restored = batch_unshuffle(shuffled, plan)
    return batch_unshuffle(restored if bad else shuffled, plan)


def _plan_of_another_group(bad: bool) -> Any:
    other = batch_shuffle(_x(), process_group=dist.new_group(list(range(dist.get_world_size()))))[1]
    mine = batch_shuffle(_x())[1]
    return batch_shuffle(_x(), plan=other if bad else mine, process_group=dist.group.WORLD)


def _sparse(bad: bool) -> Any:
    return batch_shuffle(_x().to_sparse() if bad else _x())


def _nested(bad: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nested tensors are a prototype
        return batch_shuffle(torch.nested.nested_tensor([_x(2), _x(3)]) if bad else _x())


def _meta(bad: bool) -> Any:
    return batch_shuffle(_x().to("meta") if bad else _x())


def _number_as_generator(bad: bool) -> Any:
    generator: Any = 3 if bad else torch.Generator().manual_seed(0)
    return batch_shuffle(_x(), generator=generator)


def _index_as_plan(bad: bool) -> Any:
    plans: list[Any] = [batch_shuffle(_x())[1], torch.arange(6)]
    return batch_shuffle(_x(), plan=plans[bad])


def _detached(bad: bool) -> Any:
    shuffled, plan = batch_shuffle(_x())
    # Nobody holds the very tensor that came back, but its memory.
    restored = batch_unshuffle(shuffled, plan).detach()[:]
    return batch_unshuffle(restored if bad else shuffled, plan)


REJECTED = {
    _sparse: r"batch_shuffle: expected dense tensors \(or None\), got torch.sparse_coo in leaf 0",
    _nested: r"batch_shuffle: expected dense tensors \(or None\), got nested in leaf 0",
    _meta: r"batch_shuffle: expected dense tensors \(or None\), got meta in leaf 0",
    _number_as_generator: "batch_shuffle: generator must be a torch.Generator, got int",
    _detached: r"batch_unshuffle: leaf 0, shape \(6, 2\), was unshuffled with this plan already",
    _scalar: r"batch_shuffle: leaf 0 is a scalar \(torch.float32\)",
    _text: r"batch_shuffle: expected dense tensors \(or None\), got str in leaf 1",
    _nothing: "batch_shuffle: the batch has no tensor",
    _sizes: r"disagree on the number of samples: 6 in shape \(6, 2\), 5 in shape \(5, 2\)",
    _features_of_another_size: r"batch_unshuffle: batch of 5 samples; the plan is for 6",
    _plan_of_another_size: r"batch_shuffle: batch of 5 samples; the plan is for 6",
    _twice: r"batch_unshuffle: leaf 0, shape \(6, 2\), was unshuffled with this plan already",
    _index_as_plan: "batch_shuffle: plan must be what batch_shuffle returned, got Tensor",
    _plan_of_another_group: r"batch_shuffle: the plan is of rank 1 of 3 in group '.+'; the call",
}


def _fails(function: Any, before: int, everywhere: bool = False) -> tuple[str, float]:
    """One rank, or every rank but the first, does something else; afterwards all go on."""
    batch_shuffle(_x())
    for _ in range(before):
        function(False)
    start = time.monotonic()
    text = "nothing"
    try:
        function(dist.get_rank() == 1 or (everywhere and dist.get_rank() > 0))
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    shuffled, plan = batch_shuffle(_x())
    batch_unshuffle(shuffled, plan)
    return text, seconds


# How often all ranks do the right thing before: often enough for their habit to take one message.
BEFORE = pytest.mark.parametrize("before", [0, 6])


@BEFORE
@pytest.mark.parametrize("function", REJECTED, ids=lambda f: f.__name__)
def test_what_one_rank_rejects_ends_all_at_once(function: Any, before: int) -> None:
    """Catches a rank that raises alone, peers that aren't told why, and a group left unusable."""
    results = run_on_ranks(3, _fails, function, before)
    for rank, (text, seconds) in enumerate(results):
        assert re.search(REJECTED[function], text), text
        assert seconds < SECONDS
        call = r"batch_(un)?shuffle: "
        kind = f"(Type|Value)Error: {call}" if rank == 1 else f"RuntimeError: {call}rank 1 rejected"
        assert re.match(kind, text), text


def _keys(other: bool) -> Any:
    return batch_shuffle({"b" if other else "a": _x()})


def _shape(other: bool) -> Any:
    return batch_shuffle(torch.randn(6, 3 if other else 2))


def _dtype(other: bool) -> Any:
    return batch_shuffle(_x().double() if other else _x())


def _order_of_dtypes(other: bool) -> Any:
    leaves = [_x(), _x().double()]
    return batch_shuffle(leaves[::-1] if other else leaves)


def _gradient(other: bool) -> Any:
    return batch_shuffle(_x().requires_grad_(other))


def _call(other: bool) -> Any:
    shuffled, plan = batch_shuffle(_x())
    return batch_unshuffle(shuffled * 2, plan) if other else batch_shuffle(_x())


def _generator(other: bool) -> Any:
    return batch_shuffle(_x(), generator=torch.Generator().manual_seed(int(other)))


def _source(other: bool) -> Any:
    plan = batch_shuffle(_x())[1]
    return batch_shuffle(_x(), plan=plan if other else None)


def _sizes_of_plans(other: bool) -> Any:
    """Plans of one key, for other sizes, of which this rank's is the same."""
    world = batch_shuffle(_x())[1].world
    sizes = (4 if other else 6, *(6,) * (world.size - 1))
    key = Key(5, 5)
    plan = ShufflePlan(world, sizes, key, make_route(key, sizes, world.rank))
    return batch_unshuffle(_x(), plan)


def _older_plan(other: bool) -> Any:
    plans = [batch_shuffle(_x())[1] for _ in range(2)]
    return batch_unshuffle(_x(), plans[0 if other else 1])


def _state(other: bool) -> Any:
    set_shuffle_state((1, 5 if other else 4))
    try:
        return batch_shuffle(_x())
    finally:
        set_shuffle_state(None)


def _only_one_state(other: bool) -> Any:
    set_shuffle_state((1, 5) if other else None)
    try:
        return batch_shuffle(_x())
    finally:
        set_shuffle_state(None)


DISAGREEMENTS = {
    _keys: "tree: ",
    _shape: r"leaves: \[N, 2\] torch.float32 on rank 0, \[N, 3\] torch.float32 on rank 1",
    _dtype: r"leaves: \[N, 2\] torch.float32 on rank 0, \[N, 2\] torch.float64 on rank 1",
    _order_of_dtypes: "leaves: ",
    _gradient: r"needs_gradient: \[False\] on rank 0, \[True\] on rank 1",
    _call: "call: batch_shuffle on rank 0, batch_unshuffle on rank 1",
    _generator: r"seed: \d+ on rank 0, \d+ on rank 1",
    _source: "order: the group's state on rank 0, a plan for 6 samples per rank on rank 1",
    _sizes_of_plans: r"order: a plan for 6 samples per rank on rank 0, a plan for \(4, 6",
    _older_plan: r"step: \d+ on rank 0, \d+ on rank 1",
    _state: "step: 4 on rank 0, 5 on rank 1",
    _only_one_state: "order: a new seed on rank 0, the group's state on rank 1",
}


@pytest.mark.parametrize("function", DISAGREEMENTS, ids=lambda f: f.__name__)
@BEFORE
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_disagree_all_say_so(function: Any, world_size: int, before: int) -> None:
    """Catches messages of another length or another permutation, which hang or mix samples up."""
    for text, seconds in run_on_ranks(world_size, _fails, function, before, everywhere=True):
        assert re.match(
            f"ValueError: batch_(un)?shuffle: ranks disagree on {DISAGREEMENTS[function]}", text
        ), text
        assert seconds < SECONDS


class _Breaks(nn.Module):
    def __init__(self, communicates: bool) -> None:
        super().__init__()
        self.norm = ShuffleBatchNorm(2, mode="swap") if communicates else nn.BatchNorm1d(2)
        self.bad = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        if self.bad:
            raise ValueError("out of luck")
        return y


def _encoder_breaks(before: int, communicates: bool) -> list[str]:
    network, texts = _Breaks(communicates), list[str]()
    encoder = ShuffledEncoder(network)
    for _ in range(before):
        encoder(_x())
    for _ in range(3):
        network.bad = not texts and dist.get_rank() == 1
        try:
            encoder(_x())
        except (ValueError, RuntimeError) as error:
            texts.append(str(error))
        else:
            texts.append("went on")
    return texts


@BEFORE
def test_an_encoder_that_raises_on_one_rank_leaves_all_in_step(before: int) -> None:
    """Catches peers that wait in batch_unshuffle for a rank whose encoder raised."""
    results = run_on_ranks(3, _encoder_breaks, before, communicates=False)
    assert results[1] == ["out of luck", "went on", "went on"]
    rejected = "batch_unshuffle: rank 1 rejected its batch: out of luck"
    assert results[0] == results[2] == [rejected, "went on", "went on"]


@BEFORE
def test_an_encoder_that_raises_between_exchanges_ends_the_group(before: int) -> None:
    """Catches ranks that go on out of step, each with the messages of another step."""
    results = run_on_ranks(3, _encoder_breaks, before, communicates=True, fresh=True)
    assert results[1][0] == "out of luck"
    stopped = "batch_unshuffle: rank 1 stopped: ShuffledEncoder: out of luck"
    assert [results[0][0], results[2][0]] == [stopped, stopped]
    for rank, texts in enumerate(results):
        for text in texts[1:]:
            assert "the process group is out of step since an exchange was left" in text, rank


def _no_plan() -> list[str]:
    plan, texts = batch_shuffle(_x())[1], list[str]()
    for attempt in range(2):
        bad: Any = None if dist.get_rank() == 1 and not attempt else plan
        try:
            batch_unshuffle(_x(), bad)
        except (TypeError, RuntimeError) as error:
            texts.append(str(error))
    return texts


def test_a_call_without_a_plan_ends_the_others() -> None:
    """Catches a rank that raises before it knows its peers, and then gets their last message."""
    first, second = run_on_ranks(2, _no_plan, fresh=True)
    message = "batch_unshuffle: plan must be what batch_shuffle returned, got NoneType"
    assert second[0] == message
    assert first[0] == f"batch_unshuffle: rank 1 stopped: {message}"
    assert all("the process group is out of step" in texts[1] for texts in (first, second))


def _mistaken_alike(times: int) -> list[str]:
    nothing: Any = None
    mistakes = partial(batch_unshuffle, plan=nothing), partial(batch_shuffle, process_group="data")
    texts = []
    for mistake in (*mistakes, mistakes[0]):
        for _ in range(times if dist.get_rank() else 1):
            with pytest.raises(TypeError) as caught:
                mistake(_x())
        texts.append(str(caught.value))
        shuffled, plan = batch_shuffle(_x())
        batch_unshuffle(shuffled, plan)
        time.sleep(0.3 * dist.get_rank())
    return texts


@pytest.mark.parametrize("times", [1, 2])
def test_ranks_that_make_the_same_mistake_go_on(times: int) -> None:
    """Catches a group given up for a mistake that all ranks made, in step, and caught."""
    for texts in run_on_ranks(3, _mistaken_alike, times):
        assert texts[0] == "batch_unshuffle: plan must be what batch_shuffle returned, got NoneType"
        assert "process_group must be None, a ProcessGroup or a 1-D DeviceMesh" in texts[1]


def _outside() -> str:
    group = dist.new_group([0])
    try:
        batch_shuffle(_x(), process_group=group)
    except RuntimeError as error:
        return str(error)
    return "a member"


def test_a_rank_outside_the_group_is_told() -> None:
    """Catches a rank that takes part in the shuffle of a group that it is not in."""
    inside, outside = run_on_ranks(2, _outside)
    assert inside == "a member"
    assert outside.startswith("batch_shuffle: rank 1 is not a member of the process_group")


class _Named(nn.Module):
    """Its outputs come in the order in which their names are given."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.norm, self.names = nn.BatchNorm1d(2), names

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.norm(inputs["a"])
        return {name: inputs[name] for name in self.names}


def _in_another_order(outputs: bool) -> str:
    first = dist.get_rank() == 0
    encoder = ShuffledEncoder(_Named("ab" if first or not outputs else "ba"))
    inputs = {name: _x() for name in ("ab" if first or outputs else "ba")}
    with pytest.raises(ValueError, match="ranks disagree on tree") as caught:
        encoder(**inputs)
    return str(caught.value)


@pytest.mark.parametrize("outputs", [False, True])
def test_an_encoder_with_names_in_another_order_is_told(outputs: bool) -> None:
    """Catches one rank's images mixed with another's masks, which have the same shape."""
    call = "batch_unshuffle" if outputs else "batch_shuffle"
    for text in run_on_ranks(2, _in_another_order, outputs):
        assert text.startswith(f"{call}: ")


def _large_trees() -> str:
    names = [f"leaf {k}" for k in range(400)]
    if dist.get_rank() == 1:
        names[300] = "another leaf"
    with pytest.raises(ValueError, match="ranks disagree on tree") as caught:
        batch_shuffle({name: torch.zeros(2) for name in names})
    batch_shuffle(_x(2))  # the ranks are in step
    return str(caught.value)


def test_the_difference_of_large_trees_is_shown() -> None:
    """Catches two texts of 2,048 equal characters for a difference that comes after them."""
    for text in run_on_ranks(2, _large_trees):
        assert "leaf 300" in text
        assert "another leaf" in text
        assert len(text) < 1500


def _half() -> Any:
    """A group of all ranks that is not the default one, and a plan of it."""
    group = dist.new_group(list(range(dist.get_world_size())))
    return group, batch_shuffle(_x(), process_group=group)[1]


def _index_as_plan_of_another_group() -> Any:
    plans: list[Any] = [torch.arange(6), _half()[1]]
    return batch_shuffle(_x(), plan=plans[dist.get_rank()])


def _nothing_as_plan_of_another_group() -> Any:
    plans: list[Any] = [None, _half()[1]]
    return batch_unshuffle(_x(), plans[dist.get_rank()])


def _plans_of_different_groups() -> Any:
    plans = [_half()[1], batch_shuffle(_x())[1]]
    return batch_unshuffle(_x(), plans[dist.get_rank()])


class _Fails(nn.Module):
    """Raises on rank 1 before a layer that communicates in the default group."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = ShuffleBatchNorm(2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if dist.get_rank() == 1 and self.calls == 2:
            raise ArithmeticError("out of luck")
        y: Tensor = self.norm(x)
        return y


def _encoder_with_layers_of_another_group() -> Any:
    encoder = ShuffledEncoder(_Fails(), process_group=_half()[0])
    encoder(_x())
    return encoder(_x())


def _encoder_whose_ranks_look_at_once() -> Any:
    """Both ranks find the other waiting before either says so; rank 0 has the last word."""
    report = failures.report_failure
    # Ranks look every two seconds: each finds the other first, then rank 1 reports, then rank 0.
    delays = [[4.6], [2.2]][dist.get_rank()]

    def report_late(world: Any, message: str) -> None:
        if message.startswith("ranks wait") and delays:
            time.sleep(delays.pop())
        report(world, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures, "report_failure", report_late)
        return _encoder_with_layers_of_another_group()


DEADLOCKS = {
    _index_as_plan_of_another_group: (0, "plan must be what batch_shuffle returned, got Tensor"),
    _nothing_as_plan_of_another_group: (
        0,
        "plan must be what batch_shuffle returned, got NoneType",
    ),
    _plans_of_different_groups: (0, "ranks wait for each other in different process groups: rank"),
    _encoder_with_layers_of_another_group: (1, "out of luck"),
    _encoder_whose_ranks_look_at_once: (1, "out of luck"),
}


def _outcome(function: Any) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises((TypeError, RuntimeError, ArithmeticError)) as caught:
        function()
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("function", DEADLOCKS, ids=lambda f: f.__name__)
def test_ranks_that_wait_in_different_groups_are_told(function: Any) -> None:
    """Catches ranks that wait for each other until the group's time limit, half an hour."""
    outcomes = run_on_ranks(2, _outcome, function, fresh=True)
    rank, reason = DEADLOCKS[function]
    assert reason in outcomes[rank][0], outcomes
    for text, seconds in outcomes:
        assert reason in text or "ranks wait for each other" in text, outcomes
        assert seconds < 15
