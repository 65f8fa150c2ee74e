"""The values that a number may have, and the words for them."""

import math

from shuffle_batchnorm.moco.ranges import Range


def test_ends() -> None:
    """Catches NaN and infinity, which compare as no number does, and an end on the wrong side."""
    assert [value in Range(0, 1) for value in (-1, 0, 0.5, 1, math.nan)] == [
        False, True, True, False, False
    ]  # fmt: skip
    assert [value in Range(0, with_low=False) for value in (0, 1e-9, math.inf)] == [
        False, True, False
    ]  # fmt: skip
    assert None not in Range(0)
