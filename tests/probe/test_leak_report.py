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


def test_the_verdict_is_that_of_the_numbers_and_ends_the_line() -> None:
    """Catches a verdict that was made of other numbers than the report's."""
    assert REPORT.verdict == "a leak: at least 0.28 at 95 %"
    assert str(REPORT).splitlines()[0].endswith(f"; 1024 keys in 32 batches; {REPORT.verdict}")
    assert "at 90 %" in replace(REPORT, confidence=0.9).verdict
    assert "4 batches are too few" in replace(REPORT, batches=4).verdict
    none = replace(REPORT, interval=(-0.1, 0.01))
    assert none.verdict.startswith("no leak found")
    assert "0.2 % of the keys" in replace(none, as_trained=0.002).verdict
    assert "99.0 % of the keys" in replace(none, fresh=0.99).verdict
