"""What an interval is taken to say, at the edges of the rules."""

import math

import pytest

from shuffle_batchnorm.probe.verdict import ENOUGH, SMALL, judge

ABOVE, BELOW = math.nextafter(SMALL, 1), math.nextafter(1 - SMALL, 0)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.0, 0.0), "no leak: no key depends on the other samples of its batch"),
        ((0.4, 0.5), "a leak: at least 0.4 at 95 %"),
        ((0.41999, 0.5), "a leak: at least 0.41 at 95 %"),
        ((0.001, 0.01), "a leak: at least 0.001 at 95 %"),
        ((0.0004126, 0.0009), "a leak: at least 0.00041 at 95 %"),
        ((0.994, 1.0), "a leak: at least 0.99 at 95 %"),
        ((0.0, 0.03), "no leak found; leaks above 0.03 are excluded at 95 %"),
        ((-0.01, 0.0301), "no leak found; leaks above 0.031 are excluded at 95 %"),
        ((-0.3, SMALL), "no leak found; leaks above 0.05 are excluded at 95 %"),
        ((-0.3, ABOVE), "can't tell: between -0.3 and 0.051 at 95 %; take more batches"),
        ((0.0, 0.2), "can't tell: between 0 and 0.2 at 95 %; take more batches"),
        ((-0.1, 0.2), "can't tell: between -0.1 and 0.2 at 95 %; take more batches"),
        ((-1.0, 1.0), "can't tell: between -1 and 1 at 95 %; take more batches"),
        ((-0.2, -0.1), "no leak found; leaks above 0 are excluded at 95 %"),
        ((-0.2, -0.0), "no leak found; leaks above 0 are excluded at 95 %"),
        ((-0.2, 0.0), "no leak found; leaks above 0 are excluded at 95 %"),
    ],
)
def test_edges(interval: tuple[float, float], verdict: str) -> None:
    """Catches an end that is rounded inwards, and a wide interval that reads as "no leak"."""
    assert judge(interval, as_trained=0.5, fresh=0.4) == verdict


@pytest.mark.parametrize("interval", [(0.4, 0.5), (-0.01, 0.01), (-0.1, 0.3)])
def test_few_batches_tell_nothing(interval: tuple[float, float]) -> None:
    """Catches "a leak" and "no leak found" by an interval that misses too often."""
    few = judge(interval, as_trained=0.5, fresh=0.5, batches=ENOUGH - 1)
    assert few == "can't tell: 7 batches are too few; take 8 or more"
    assert "too few" not in judge(interval, as_trained=0.5, fresh=0.5, batches=ENOUGH)
    assert judge((0, 0), as_trained=0.5, fresh=0.5, batches=2).startswith("no leak: ")


def test_no_room_for_a_leak_is_not_no_leak() -> None:
    """Catches "no leak found" for a network that recognises nothing, or all of it anyway."""
    none = judge((-0.01, 0.01), as_trained=0.0123, fresh=0.01)
    assert none == "can't tell: only 1.2 % of the keys are recognised at all; train longer"
    every = judge((-0.01, 0.01), as_trained=0.99, fresh=0.987)
    said = "98.7 % of the keys are recognised in fresh batches as well; take the queue of the "
    said += "training, or more negatives"
    assert every == f"can't tell: {said}"
    assert judge((-0.01, 0.01), as_trained=SMALL, fresh=SMALL).startswith("no leak found")
    assert judge((-0.01, 0.01), as_trained=1.0, fresh=BELOW).startswith("no leak found")
    assert judge((0.001, 0.01), as_trained=0.99, fresh=0.98).startswith("a leak")


def test_confidence_is_told() -> None:
    assert judge((-0.01, 0.01), as_trained=0.5, fresh=0.5, confidence=0.999).endswith("at 99.9 %")
