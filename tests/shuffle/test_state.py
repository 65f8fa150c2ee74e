"""The seed and the step of a group's shuffles: repeated, resumed, and refused."""

import pytest
import torch

from shuffle_batchnorm import batch_shuffle, get_shuffle_state, set_shuffle_state


def test_state_and_generator_repeat_a_run() -> None:
    """Catches a counter that doesn't advance, a resume that starts anew, a touched global state."""
    x, before = torch.arange(32), torch.get_rng_state()
    set_shuffle_state(None)
    assert get_shuffle_state() is None
    first = batch_shuffle(x)[0]
    state = get_shuffle_state()
    assert state is not None
    assert state[1] == 1
    second, third = batch_shuffle(x)[0], batch_shuffle(x)[0]
    set_shuffle_state(state)
    assert torch.equal(batch_shuffle(x)[0], second)
    assert torch.equal(batch_shuffle(x)[0], third)
    assert get_shuffle_state() == (state[0], 3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    drawn = [batch_shuffle(x, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_of_the_users_choice_is_left_alone() -> None:
    """Catches a state, or an order, that is made on torch's default device."""
    for n in (32, 33):
        x = torch.arange(n)
        with torch.device("meta"):
            set_shuffle_state((12, 1))
            found = batch_shuffle(x)[0]
        set_shuffle_state((12, 1))
        assert torch.equal(batch_shuffle(x)[0], found)


def test_a_bad_state_is_refused() -> None:
    """Catches a seed that the permutations can't take."""
    with pytest.raises(TypeError, match=r"two ints, seed and step, got \(1, 2.5\)"):
        set_shuffle_state((1, 2.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*62"):
        set_shuffle_state((1, -1))
