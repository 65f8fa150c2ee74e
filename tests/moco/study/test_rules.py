"""Rules from planted cells."""

from dataclasses import replace
from typing import Any

import pytest

from shuffle_batchnorm.moco.comparison.summary import Estimate
from shuffle_batchnorm.moco.study.rules import rules, suffices
from shuffle_batchnorm.moco.study.summary import CellSummary


def cell(n: int, blocks: int, high: float | None, seeds: int = 5) -> CellSummary:
    leak = None if high is None else Estimate(high - 0.01, 0.004, high - 0.02, high)
    rest: Any = dict.fromkeys(["as_trained", "fresh", "knn", "gain"])
    leaks = dict.fromkeys(range(seeds), 0.0)
    name = f"n{n}-B{blocks}"
    return CellSummary(name, "grid", n, blocks, {}, leaks, diverged=0, leak=leak, **rest)


@pytest.mark.parametrize(
    ("high", "seeds", "expected"),
    [(0.029, 5, True), (0.031, 5, False), (0.029, 2, False), (None, 5, False)],
)
def test_the_upper_end_decides(high: float | None, seeds: int, expected: bool) -> None:
    """Catches a rule from the runs' own intervals, which say nothing of other seeds."""
    assert suffices(cell(8, 4, high, seeds)) is expected


def test_the_fewest_blocks_from_which_on_all_suffice() -> None:
    """Catches a lucky cell below one that leaks, and sizes that are mixed up."""
    ends = {
        8: {1: 0.5, 2: 0.1, 3: 0.02, 4: 0.04, 6: 0.02, 8: 0.01},
        16: {1: 0.4, 2: 0.01, 4: 0.02},
        4: {1: 0.6, 4: 0.05},
    }
    found = rules(cell(n, b, high) for n, some in ends.items() for b, high in some.items())
    fewest = [(one.n, one.cell and one.cell.B) for one in found]
    assert fewest == [(4, None), (8, 6), (16, 2)]
    assert [one.local and one.local.cell for one in found] == ["n4-B1", "n8-B1", "n16-B1"]


def test_local_may_suffice() -> None:
    [rule] = rules([cell(64, 1, 0.02), cell(64, 2, 0.01)])
    assert rule.cell is rule.local


def test_what_diverges_does_not_suffice() -> None:
    """Catches a rule from those seeds that were lucky."""
    good = cell(8, 4, 0.02)
    assert suffices(good)
    assert not suffices(replace(good, diverged=1))
