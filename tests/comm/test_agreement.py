"""Ranks compare a kind of call once, all raise if one can't go on, and later calls are trusted."""

from typing import Any

import pytest
import torch.distributed as dist

from ranks import run_on_ranks
from shuffle_batchnorm.comm import agreement
from shuffle_batchnorm.comm.world import resolve


def _agree(terms: list[dict[str, str]], error: str = "", call: str = "call") -> Any:
    """Rank 1 has the last terms, and the error if there is one; all others the first terms."""
    mine = dist.get_rank() == 1
    world = resolve(None, call)
    failure = ValueError(error) if error and mine else None
    try:
        return agreement.agree(call, terms[-1 if mine else 0], failure, world, own=[world.rank])
    except (ValueError, RuntimeError) as raised:
        # In step: what follows is not taken for an answer.
        assert agreement.agree(call, {}, None, world, own=7) == [7] * world.size
        return f"{type(raised).__name__}: {raised}"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_learn_what_each_has_of_its_own(world_size: int) -> None:
    """Catches answers in another order than that of the ranks."""
    for own in run_on_ranks(world_size, _agree, [{"mode": "swap"}]):
        assert own == [[rank] for rank in range(world_size)]


def test_a_difference_is_named_on_every_rank() -> None:
    """Catches a rank that goes on alone, and a message that doesn't say what differs."""
    for text in run_on_ranks(3, _agree, [{"a": "1", "mode": "swap"}, {"a": "1", "mode": "sync"}]):
        assert text == "ValueError: call: ranks disagree on mode: swap on rank 0, sync on rank 1"


def test_the_difference_of_long_terms_is_shown() -> None:
    """Catches two texts of equal characters for a difference that comes after them."""
    long = "x" * 3000
    for text in run_on_ranks(2, _agree, [{"tree": long + "a"}, {"tree": long + "b"}]):
        assert text.startswith("ValueError: call: ranks disagree on tree: ... x")
        assert "xa on rank 0" in text
        assert text.endswith("xb on rank 1")
        assert len(text) < 1500


@pytest.mark.parametrize("reason", ["out of luck", "\N{SNOWMAN}" * 4000], ids=["short", "long"])
def test_what_one_rank_rejects_is_quoted_by_its_peers(reason: str) -> None:
    """Catches a rank that raises alone, and an answer that is cut in the middle of its JSON."""
    first, second, third = run_on_ranks(3, _agree, [{"mode": "swap"}], reason)
    assert second == f"ValueError: {reason}"
    assert first == third == f"RuntimeError: call: rank 1 rejected its input: {reason[:200]}"


def _at_another_call() -> str:
    world = resolve(None, "call")
    with pytest.raises(ValueError, match="different calls") as caught:
        agreement.agree(["batch_shuffle", "shuffle_batch_norm"][world.rank], {}, None, world)
    return str(caught.value)


def test_ranks_that_compare_different_calls_are_told() -> None:
    """Catches terms of a layer compared with those of a shuffle."""
    for rank, text in enumerate(run_on_ranks(2, _at_another_call)):
        call = ["batch_shuffle", "shuffle_batch_norm"][rank]
        assert text == (
            f"{call}: ranks are at different calls: rank 0 at batch_shuffle, rank 1 at "
            "shuffle_batch_norm"
        )


def _memory() -> None:
    group: Any = dist.new_group([0, 1])
    world, other = resolve(None, "call"), resolve(group, "call")
    assert agreement.recall(world, "kind") is None
    agreement.remember(world, "kind", [1, 2])
    assert agreement.recall(world, "kind") == [1, 2]
    assert agreement.recall(world, "another kind") is None
    assert agreement.recall(other, "kind") is None


def test_a_kind_is_remembered_by_group() -> None:
    """Catches an agreement of one group, or of one kind, taken for that of another."""
    run_on_ranks(2, _memory)


def _many_kinds() -> bool:
    world = resolve(None, "call")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_MOST_KINDS", 3)
        for kind in range(8):
            agreement.remember(world, kind, [])
        return len(agreement._kinds[world.group]) <= 3


def test_memory_is_bounded() -> None:
    """Catches a loop over ever new kinds, such as epochs, that fills the memory."""
    assert run_on_ranks(2, _many_kinds) == [True, True]


def test_one_process_raises_its_own_error() -> None:
    with pytest.raises(TypeError, match="no tensor"):
        agreement.agree("call", {}, TypeError("no tensor"), resolve(None, "call"))
