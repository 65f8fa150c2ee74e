"""What one rank can't accept, or does differently, ends all ranks with a clear error."""

import re
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ranks import run_on_ranks
from shuffle_batchnorm import (
    ShuffledEncoder,
    batch_shuffle,
    batch_unshuffle,
    set_shuffle_state,
)
from shuffle_batchnorm.comm.world import resolve
from shuffle_batchnorm.shuffle.permutations import Key, make_route
from shuffle_batchnorm.shuffle.plan import ShufflePlan

Refused = tuple[Any, type[Exception], str]
REFUSED: dict[str, Refused] = {
    "scalar": (torch.tensor(1.0), ValueError, r"leaf 0 is a scalar \(torch.float32\)"),
    "no tensor": ([None], ValueError, "the batch has no tensor"),
    "text": ({"x": torch.ones(2), "y": ["a"]}, TypeError, "got str in leaf 1"),
    "sizes": ([torch.ones(2), torch.ones(3, 1)], ValueError, r"2 in shape \(2,\), 3 in shape"),
    "sparse": (torch.eye(2).to_sparse(), TypeError, "got torch.sparse_coo in leaf 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages_name_call_value_and_rule(name: str) -> None:
    """Catches bad input that is let through, or refused without a reason."""
    batch, error, message = REFUSED[name]
    with pytest.raises(error, match=f"batch_shuffle: .*{message}"):
        batch_shuffle(batch)
    with pytest.raises(error, match=f"batch_unshuffle: .*{message}"):
        batch_unshuffle(batch, batch_shuffle(torch.ones(2))[1])


SECONDS = 1.5  # less than the patience of a waiting rank: it was told in the comparison


def _x(n: int = 6) -> Tensor:
    return torch.randn(n, 2)


def _plan(group: Any, step: int = 5, n: int = 6) -> ShufflePlan:
    """A plan for n samples on the first rank and 6 on the others, without a shuffle."""
    world = resolve(group, "test")
    sizes, key = (n, *[6] * (world.size - 1)), Key(5, step)
    return ShufflePlan(world, sizes, key, make_route(key, sizes, world.rank))


# What one rank gets wrong, or does differently, in a group.


def _scalar(bad: bool, group: Any) -> Any:
    return batch_shuffle(torch.tensor(1.0) if bad else _x(), process_group=group)


def _scalar_of_declared_sizes(bad: bool, group: Any) -> Any:
    for x in (_x(), _x(5), torch.tensor(1.0) if bad else _x()):
        batch_shuffle(x, process_group=group, uneven=True)


def _text(bad: bool, group: Any) -> Any:
    return batch_shuffle({"x": _x(), "name": "a" if bad else None}, process_group=group)


def _nothing(bad: bool, group: Any) -> Any:
    return batch_shuffle([] if bad else _x(), process_group=group)


def _sizes(bad: bool, group: Any) -> Any:
    return batch_shuffle([_x(), _x(5 if bad else 6)], process_group=group)


def _features_of_another_size(bad: bool, group: Any) -> Any:
    return batch_unshuffle(_x(5 if bad else 6), batch_shuffle(_x(), process_group=group)[1])


def _plan_of_another_size(bad: bool, group: Any) -> Any:
    return batch_shuffle(_x(5 if bad else 6), plan=_plan(group))


def _twice(bad: bool, group: Any) -> Any:
    plan = _plan(group)
    x = _x()
    # Nobody holds the very tensor that came back, but its memory.
    plan._returned.append(StorageWeakRef(x.untyped_storage()))
    return batch_unshuffle(x.detach()[:] if bad else _x(), plan)


def _plan_of_another_group(bad: bool, group: Any) -> Any:
    other = _plan(dist.new_group())
    return batch_shuffle(_x(), plan=other if bad else _plan(group), process_group=group)


def _sparse(bad: bool, group: Any) -> Any:
    return batch_shuffle(_x().to_sparse() if bad else _x(), process_group=group)


def _nested(bad: bool, group: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nested tensors are a prototype
        nested = torch.nested.nested_tensor([_x(2), _x(3)])
        return batch_shuffle(nested if bad else _x(), process_group=group)


def _meta(bad: bool, group: Any) -> Any:
    return batch_shuffle(_x().to("meta") if bad else _x(), process_group=group)


def _number_as_generator(bad: bool, group: Any) -> Any:
    generator: Any = 3 if bad else torch.Generator().manual_seed(0)
    return batch_shuffle(_x(), generator=generator, process_group=group)


def _index_as_plan(bad: bool, group: Any) -> Any:
    plan: Any = torch.arange(6) if bad else _plan(group)
    return batch_shuffle(_x(), plan=plan, process_group=group)


REJECTED = {
    _sparse: r"batch_shuffle: expected dense tensors \(or None\), got torch.sparse_coo in leaf 0",
    _nested: r"batch_shuffle: expected dense tensors \(or None\), got nested in leaf 0",
    _meta: r"batch_shuffle: expected dense tensors \(or None\), got meta in leaf 0",
    _number_as_generator: "batch_shuffle: generator must be a torch.Generator, got int",
    _scalar: r"batch_shuffle: leaf 0 is a scalar \(torch.float32\)",
    _scalar_of_declared_sizes: r"batch_shuffle: leaf 0 is a scalar \(torch.float32\)",
    _text: r"batch_shuffle: expected dense tensors \(or None\), got str in leaf 1",
    _nothing: "batch_shuffle: the batch has no tensor",
    _sizes: r"disagree on the number of samples: 6 in shape \(6, 2\), 5 in shape \(5, 2\)",
    _features_of_another_size: r"batch_unshuffle: batch of 5 samples; the plan is for 6",
    _plan_of_another_size: r"batch_shuffle: batch of 5 samples; the plan is for 6",
    _twice: r"batch_unshuffle: leaf 0, shape \(6, 2\), was unshuffled with this plan already",
    _index_as_plan: "batch_shuffle: plan must be what batch_shuffle returned, got Tensor",
    _plan_of_another_group: r"batch_shuffle: the plan is of rank 1 of 3 in group '.+'; the call",
}


def _fails(function: Any, everywhere: bool = False) -> tuple[str, float]:
    """One rank, or every rank but the first, does something else; afterwards all go on."""
    group = dist.new_group()  # that has agreed on nothing yet
    start = time.monotonic()
    text = "nothing"
    try:
        function(dist.get_rank() == 1 or (everywhere and dist.get_rank() > 0), group)
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    x = _x()
    shuffled, plan = batch_shuffle(x, process_group=group)
    assert torch.equal(batch_unshuffle(shuffled, plan), x)
    return text, seconds


@pytest.mark.parametrize("function", REJECTED, ids=lambda f: f.__name__)
def test_what_one_rank_rejects_at_first_ends_all_at_once(function: Any) -> None:
    """Catches a rank that raises alone, peers that aren't told why, and a group left unusable."""
    for rank, (text, seconds) in enumerate(run_on_ranks(3, _fails, function)):
        assert re.search(REJECTED[function], text), text
        assert seconds < SECONDS
        call = "batch_(un)?shuffle(, agreeing on a seed)?: "
        kind = f"(Type|Value)Error: {call}" if rank == 1 else f"RuntimeError: {call}rank 1 rejected"
        assert re.match(kind, text), text


def _keys(other: bool, group: Any) -> Any:
    return batch_shuffle({"b" if other else "a": _x()}, process_group=group)


def _shape(other: bool, group: Any) -> Any:
    return batch_shuffle(torch.randn(6, 3 if other else 2), process_group=group)


def _dtype(other: bool, group: Any) -> Any:
    return batch_shuffle(_x().double() if other else _x(), process_group=group)


def _order_of_dtypes(other: bool, group: Any) -> Any:
    leaves = [_x(), _x().double()]
    return batch_shuffle(leaves[::-1] if other else leaves, process_group=group)


def _gradient(other: bool, group: Any) -> Any:
    return batch_shuffle(_x().requires_grad_(other), process_group=group)


def _declared(other: bool, group: Any) -> Any:
    return batch_shuffle(_x(), uneven=other, process_group=group)


def _call(other: bool, group: Any) -> Any:
    plan = _plan(group)
    return batch_unshuffle(_x(), plan) if other else batch_shuffle(_x(), plan=plan)


def _generator(other: bool, group: Any) -> Any:
    generator = torch.Generator().manual_seed(int(other))
    return batch_shuffle(_x(), generator=generator, process_group=group)


def _drawn(other: bool, group: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    if other:
        torch.rand(1, generator=generator)
    return batch_shuffle(_x(), generator=generator, process_group=group)


def _source(other: bool, group: Any) -> Any:
    set_shuffle_state((1, 4), group)
    return batch_shuffle(_x(), plan=_plan(group) if other else None, process_group=group)


def _sizes_of_plans(other: bool, group: Any) -> Any:
    """Plans of one key, for other sizes, of which this rank's is the same."""
    return batch_unshuffle(_x(), _plan(group, n=4 if other else 6))


def _older_plan(other: bool, group: Any) -> Any:
    return batch_unshuffle(_x(), _plan(group, step=4 if other else 5))


def _state(other: bool, group: Any) -> Any:
    set_shuffle_state((1, 0), group)
    for _ in range(2):
        batch_shuffle(_x(), process_group=group)
    set_shuffle_state((1, 5 if other else 4), group)  # the seed that all have agreed on
    try:
        return batch_shuffle(_x(), process_group=group)
    finally:
        set_shuffle_state(None, group)


def _only_one_state(other: bool, group: Any) -> Any:
    set_shuffle_state((1, 5) if other else None, group)
    try:
        return batch_shuffle(_x(), process_group=group)
    finally:
        set_shuffle_state(None, group)


DIFFERENT = "ranks are at different calls: rank 0 at batch_shuffle"
DISAGREEMENTS = {
    _keys: "ranks disagree on tree: ",
    _shape: r"ranks disagree on leaves: \[N, 2\] torch.float32 on rank 0, \[N, 3\] torch.float32",
    _dtype: r"ranks disagree on leaves: \[N, 2\] torch.float32 on rank 0, \[N, 2\] torch.float64",
    _order_of_dtypes: "ranks disagree on leaves: ",
    _gradient: r"ranks disagree on needs_gradient: \[False\] on rank 0, \[True\] on rank 1",
    _declared: "ranks disagree on uneven: False on rank 0, True on rank 1",
    _call: f"{DIFFERENT}, rank 1 at batch_unshuffle",
    _generator: "ranks disagree on order: a generator seeded with 0 on rank 0, a generator",
    _drawn: r"ranks disagree on seed: \d+ on rank 0, \d+ on rank 1",
    _source: "ranks disagree on order: the group's state on rank 0, a plan for 6 samples per rank",
    _sizes_of_plans: r"ranks disagree on order: a plan for 6 samples per rank on rank 0, a plan",
    _older_plan: "ranks disagree on step: 5 on rank 0, 4 on rank 1",
    _state: "ranks disagree on step: 4 on rank 0, 5 on rank 1",
    _only_one_state: f"{DIFFERENT}, agreeing on a seed, rank 1 at batch_shuffle",
}


@pytest.mark.parametrize("function", DISAGREEMENTS, ids=lambda f: f.__name__)
def test_ranks_that_disagree_all_say_so(function: Any) -> None:
    """Catches messages of another length or another permutation, which hang or mix samples up."""
    for text, seconds in run_on_ranks(3, _fails, function, everywhere=True):
        call = "ValueError: batch_(un)?shuffle(, agreeing on a seed)?: "
        assert re.match(call + DISAGREEMENTS[function], text), text
        assert seconds < SECONDS


# The same after the ranks have agreed: they trust each other, and a rank that can't go on
# announces it to peers that wait for it.


class _Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bad = nn.BatchNorm1d(2), False

    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            raise ValueError("out of luck")
        y: Tensor = self.norm(x)
        return y


def _encoder_raises(bad: bool, group: Any) -> Any:
    network = _Breaks()
    encoder = ShuffledEncoder(network, process_group=group)
    encoder(_x())
    network.bad = bad
    return encoder(_x())


def _no_plan(bad: bool, group: Any) -> Any:
    del group  # which group the peers of a rank without a plan wait in is not known
    plan: Any = None if bad else batch_shuffle(_x())[1]
    if bad:
        batch_shuffle(_x())
    return batch_unshuffle(_x(), plan)


LATER = {
    _scalar: r"leaf 0 is a scalar \(torch.float32\)",
    _features_of_another_size: "batch of 5 samples; the plan is for 6",
    _encoder_raises: "out of luck",
    _no_plan: "plan must be what batch_shuffle returned, got NoneType",
}


def _outcome(function: Any, bad: bool, group: Any) -> tuple[str, float]:
    start = time.monotonic()
    try:
        function(bad, group)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error), time.monotonic() - start
    return "nothing", 0.0


def _fail_later() -> dict[str, list[tuple[str, float]]]:
    """What comes of each mistake, and of a shuffle in the same group afterwards."""
    found = {}
    for function in LATER:
        group = dist.group.WORLD if function is _no_plan else dist.new_group()
        for _ in range(2):
            function(False, group)
        mistaken = dist.get_rank() == 1
        found[function.__name__] = [
            _outcome(function, mistaken, group),
            _outcome(_scalar, False, group),
        ]
    return found


def test_what_one_rank_rejects_later_ends_its_peers_within_seconds() -> None:
    """Catches peers that wait for the group's time limit, and a group that goes on out of step."""
    for rank, found in enumerate(run_on_ranks(3, _fail_later, fresh=True)):
        for function, message in LATER.items():
            (text, seconds), (after, _) = found[function.__name__]
            assert re.search(message, text), text
            assert (rank == 1) != bool(re.match(r"batch_(un)?shuffle: rank 1 stopped: ", text)), (
                text
            )
            assert seconds < 15
            assert "the process group is out of step since an exchange was left" in after
