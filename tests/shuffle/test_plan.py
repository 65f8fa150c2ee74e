"""Plans, and where permutations come from."""

from typing import Any

import pytest
import torch

from shuffle_batchnorm import batch_shuffle, batch_unshuffle, set_shuffle_state
from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.shuffle.plan import find_origin


def test_unshuffling_twice_is_refused_and_many_outputs_are_not() -> None:
    """Catches a second unshuffle, and a plan that can be used for a single output only."""
    shuffled, plan = batch_shuffle(torch.randn(8, 3))
    features = batch_unshuffle(shuffled * 2, plan)
    other = batch_unshuffle({"a": shuffled * 3, "b": shuffled}, plan)
    for twice in (features, other["b"], [shuffled * 2, other["a"]], features[:, :2]):
        with pytest.raises(ValueError, match=r"batch_unshuffle: leaf ., shape .* unshuffled with"):
            batch_unshuffle(twice, plan)
    batch_unshuffle(features, batch_shuffle(features)[1])


def test_plans_that_do_not_fit_are_refused() -> None:
    """Catches MoCo's index tensor as a plan, another batch size, and a plan with a generator."""
    _, plan = batch_shuffle(torch.ones(4))
    for wrong in (torch.arange(4), None):
        with pytest.raises(TypeError, match="batch_unshuffle: plan must be what batch_shuffle"):
            batch_unshuffle(torch.ones(4), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch of 5 samples; the plan is for 4 samples"):
        batch_unshuffle(torch.ones(5), plan)
    with pytest.raises(ValueError, match=r"batch_shuffle: batch of 5 samples; the plan is for 4"):
        batch_shuffle(torch.ones(5), plan=plan)
    with pytest.raises(ValueError, match="generator must be None"):
        batch_shuffle(torch.ones(4), plan=plan, generator=torch.Generator())


def test_calls_of_a_loop_are_of_one_kind() -> None:
    """Catches a step or a drawn number in a kind: then every call would be compared."""
    set_shuffle_state((5, 0))
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(2):
        _, plan = batch_shuffle(torch.ones(4))
        _, drawn = batch_shuffle(torch.ones(4), generator=generator)
        sources = (None, None), (None, generator), (plan, None), (drawn, None)
        found.append([find_origin(World(), *source) for source in sources])
    for one, other in zip(*found, strict=True):
        assert one.kind == other.kind
        assert one.key != other.key
    assert len({origin.kind for origin in found[0]}) == 4


def test_a_state_that_is_set_and_a_seed_of_another_generator_are_new_kinds() -> None:
    """Catches a seed that ranks have not compared."""
    kinds = set()
    for seed in (5, 5, 6):
        set_shuffle_state((seed, 0))
        kinds.add(find_origin(World(), None).kind)
        kinds.add(find_origin(World(), None, torch.Generator().manual_seed(seed)).kind)
    assert len(kinds) == 3 + 2


class _OnGpu(torch.Generator):
    """As a generator of a GPU is from outside, whose numbers can't be read without waiting."""

    device = torch.device("cuda")
    offset = 8

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> Any:
        self.offset = offset


def test_a_generator_of_a_gpu_is_not_read() -> None:
    """Catches a shuffle that waits for the GPU, or that draws the same order again."""
    one, other = _OnGpu(), _OnGpu()
    for generator in (one, other):
        generator.manual_seed(7)
    orders = [batch_shuffle(torch.arange(64), generator=one)[0] for _ in range(2)]
    assert not torch.equal(*orders)
    assert torch.equal(batch_shuffle(torch.arange(64), generator=other)[0], orders[0])
