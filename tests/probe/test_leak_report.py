"""Shares of a leak, and the report by layer."""

from dataclasses import replace

import pytest

from shuffle_batchnorm import LeakReport

REPORT = LeakReport(
    0.8, 0.5, 0.3, 0.01, (0.28, 0.32), 0.95, 1024, 32, {"bn1": 0.36, "bn2": -0.06},
    {"bn1": (0.3, 0.4), "bn2": (-0.08, -0.04)},
)  # fmt: skip


def test_shares_are_parts_of_a_leak_that_is_there() -> None:
    """Catches shares of a leak that may as well be 0."""
    assert REPORT.shares == pytest.approx({"bn1": 1.2, "bn2": -0.2})
    assert replace(REPORT, interval=(-0.01, 0.61)).shares == {}


def test_a_line_for_each_layer() -> None:
    assert str(REPORT).splitlines()[1:] == [
        "   0.360  bn1  (0.300 to 0.400)",
        "  -0.060  bn2  (-0.080 to -0.040)",
    ]
