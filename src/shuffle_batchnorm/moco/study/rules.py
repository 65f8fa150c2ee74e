"""From the measured cells to rules: how many blocks suffice."""

from collections.abc import Iterable
from dataclasses import dataclass

from shuffle_batchnorm.moco.comparison.summary import SEEDS_FOR_SPREAD

from .summary import CellSummary

# What is called no leak: at most so much of the pretext accuracy, with 95 % confidence.
NEGLIGIBLE = 0.03


@dataclass(frozen=True)
class Rule:
    """What suffices for one group size.

    Attributes:
        n: samples in a group.
        local: the cell with no blocks, if it is measured.
        cell: that with the fewest blocks from which on no leak was found; None if there is none.
    """

    n: int
    local: CellSummary | None
    cell: CellSummary | None


def suffices(cell: CellSummary) -> bool:
    """Whether the upper end of the leak's interval over seeds is negligible, and none diverged."""
    high = cell.leak.high if cell.leak and len(cell.leaks) >= SEEDS_FOR_SPREAD else None
    return not cell.diverged and high is not None and high < NEGLIGIBLE


def rules(cells: Iterable[CellSummary]) -> list[Rule]:
    """One rule for each group size: the fewest blocks that suffice, as do all measured above."""
    by_size: dict[int, list[CellSummary]] = {}
    for cell in cells:
        by_size.setdefault(cell.n, []).append(cell)
    found = []
    for n, some in sorted(by_size.items()):
        best = None
        for cell in sorted(some, key=lambda one: -one.B):
            if not suffices(cell):
                break
            best = cell
        found.append(Rule(n, next((cell for cell in some if cell.B == 1), None), best))
    return found
