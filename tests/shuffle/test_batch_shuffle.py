"""What the ranks of a shuffle agree on, when, and by how many messages."""

import time
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from meters import received_messages
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ranks import run_on_ranks
from shuffle_batchnorm import (
    ShuffledPairSampler,
    batch_shuffle,
    batch_unshuffle,
    set_shuffle_state,
)


class Unread(TorchFunctionMode):
    """Fail where a number of a batch, or of what follows from one, is read on the host.

    It is what would wait for a GPU, or for the peer that has sent the batch.
    """

    reads: ClassVar = {
        Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.equal,
        Tensor.__int__, Tensor.__index__, Tensor.__float__, Tensor.__bool__, torch.equal,
    }  # fmt: skip

    def __init__(self, *batch: Tensor) -> None:
        super().__init__()
        self.ids = {id(tensor) for tensor in batch}
        self.alive: list[Tensor] = []  # so that no other tensor gets its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = any(id(leaf) in self.ids for leaf in tree_leaves((args, kwargs)))
        assert not (used and func in self.reads), f"{func} reads a number of the batch"
        result = func(*args, **kwargs)
        if used:
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.ids |= {id(tensor) for tensor in tensors}
            self.alive += tensors
        return result


def _repeat(origin: str, sizes: list[int], steps: int) -> list[list[list[str]]]:
    """Return the messages of each shuffle, unshuffle and backward pass of a loop."""
    n, group = sizes[dist.get_rank()], dist.new_group()  # that has agreed on nothing yet
    sampler = ShuffledPairSampler(range(4 * sum(sizes)), n or 1, process_group=group)
    options: dict[str, Any] = {"process_group": group}
    if origin == "generator":
        options["generator"] = torch.Generator().manual_seed(3)
    elif origin == "plan":
        options["plan"] = batch_shuffle(torch.zeros(n), process_group=group)[1]
    found = []
    for step in range(steps):
        x = torch.randn(n, 2, requires_grad=True)
        shuffled, plan = x * 1, None
        with Unread(*[x, shuffled] if step else []) as unread:
            with received_messages() as out:
                if origin == "sampler":
                    plan = sampler.plan(step)
                else:
                    shuffled, plan = batch_shuffle(x, **options)
            features = shuffled.sin()
            assert not step or id(features) in unread.ids
            with received_messages() as back:
                y = batch_unshuffle(features, plan)
            with received_messages() as backward:
                y.sum().backward()
        found.append([[name for name, _ in message] for message in (out, back, backward)])
    return found


ORIGINS = ["state", "generator", "plan"]
LOOPS = [(origin, sizes) for origin in ORIGINS for sizes in ([4, 4], [6, 6, 6], [5, 3], [0, 4, 2])]
# Its batches are even, but for the last.
LOOPS += [("sampler", [4, 4]), ("sampler", [6, 6, 6])]


@pytest.mark.parametrize(("origin", "sizes"), LOOPS, ids=str)
def test_what_a_loop_repeats_takes_one_message(origin: str, sizes: list[int]) -> None:
    """Catches a header, and a read that waits for a GPU or a peer, after the first call."""
    for first, *later in run_on_ranks(len(sizes), _repeat, origin, sizes, 4):
        message = ["all_to_all_single"]
        assert "all_gather" in first[1]
        assert ("all_gather" in first[0]) == (origin != "sampler")
        there = [] if origin == "sampler" else message
        ways = 1 if origin == "sampler" else 2  # the gradient's
        assert later == [[there, message, message * ways]] * 3


def test_the_meter_of_reads_sees_one() -> None:
    x = torch.ones(3)
    for read in (lambda: (x + 1).sum().item(), lambda: int(x[0] * 2), lambda: x.mul(2).tolist()):
        with pytest.raises(AssertionError, match="reads a number"), Unread(x):
            read()


def _changing(uneven: bool) -> list[list[str]]:
    """All ranks change their batch size together, or, declared, each as it likes."""
    rank, group, found = dist.get_rank(), dist.new_group(), []
    if uneven:  # a size that is trusted elsewhere
        batch_shuffle(torch.arange(6), process_group=group)
    for step, n in enumerate([4, 6, 4, 5, 6]):
        size = n + step * rank if uneven else n
        x = torch.arange(size) + 100 * rank
        with received_messages() as messages:
            shuffled, plan = batch_shuffle(x, process_group=group, uneven=uneven)
        assert torch.equal(batch_unshuffle(shuffled, plan), x)
        found.append([name for name, _ in messages])
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_sizes_that_change_together_are_compared_once(world_size: int) -> None:
    """Catches a kind of call that is forgotten, and one that is taken for another."""
    header, message = "all_gather", "all_to_all_single"
    for found in run_on_ranks(world_size, _changing, False):
        assert found[0][1:] == found[1] == found[3] == [header, message]
        assert found[2] == found[4] == [message]


def test_declared_sizes_are_compared_at_every_call() -> None:
    """Catches a rank that trusts sizes which others have changed: gloo aborts the process."""
    for found in run_on_ranks(3, _changing, True):
        assert all(names[-2:] == ["all_gather", "all_to_all_single"] for names in found)


def _two_plans(program: str) -> None:
    rank = dist.get_rank()
    even, uneven = (batch_shuffle(torch.randn(n, 2), uneven=True)[1] for n in (4, 4 + 2 * rank))
    for letter in program:
        plan = even if letter == "e" else uneven
        x = torch.randn(plan.sizes[rank], 2)
        shuffled = batch_shuffle(x, plan=plan)[0]
        assert torch.equal(batch_unshuffle(shuffled, plan), x)


def test_a_loop_of_even_batches_does_not_take_an_uneven_plan_for_one() -> None:
    """Catches a rank whose batch has the usual size while its peer's has not: gloo aborts."""
    run_on_ranks(2, _two_plans, "eeeeeueeuu")


def _x(n: int = 6) -> Tensor:
    return torch.randn(n, 2)


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


def _meeting_the_first() -> list[tuple[int, ...]]:
    """Which of rank 1's samples are on the rank of rank 0's first one, by step."""
    set_shuffle_state((5, 0))
    met: list[tuple[int, ...]] = []
    for _ in range(40):
        x = torch.arange(4) + 4 * dist.get_rank()
        shuffled = batch_shuffle(x)[0].tolist()
        met.append(tuple(sample for sample in shuffled if sample >= 4) if 0 in shuffled else ())
    return met


def test_ranks_choose_for_themselves() -> None:
    """Catches one choice for all ranks, by which samples of the same position always meet."""
    here, there = run_on_ranks(2, _meeting_the_first)
    met = {mine or theirs for mine, theirs in zip(here, there, strict=True)}
    # Any two of rank 1's four samples: 6 pairs, each in any order.
    assert len({frozenset(pair) for pair in met}) == 6


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
        time.sleep(0.1 * dist.get_rank())
    return texts


def test_ranks_that_make_the_same_mistake_go_on() -> None:
    """Catches a group given up for a mistake that all ranks made, in step, and caught."""
    for texts in run_on_ranks(3, _mistaken_alike, 2):
        assert texts[0] == "batch_unshuffle: plan must be what batch_shuffle returned, got NoneType"
        assert "process_group must be None, a ProcessGroup or a 1-D DeviceMesh" in texts[1]
