"""All that is computed from the records: cells, the law, what it predicted, rules."""

from collections.abc import Sequence
from dataclasses import dataclass

from shuffle_batchnorm.moco.comparison.summary import Record

from .cells import BATCH, HELD_OUT
from .fit import Fit, Prediction, choose, collect, predict
from .rules import Rule, rules
from .summary import CellSummary, summarise


@dataclass(frozen=True)
class Analysis:
    """What the records say.

    Attributes:
        cells: by name.
        fits: of all families, the best first; none where there are too few cells.
        predictions: of the cells that were held out, by the best fit and, where it is of a family
            that was added late, by the best of the others.
        beyond: of the cells at the other batch size, which are not fitted either.
        rules: one per group size.
    """

    cells: dict[str, CellSummary]
    fits: list[Fit]
    predictions: list[Prediction]
    beyond: list[Prediction]
    rules: list[Rule]

    def of(self, *parts: str) -> list[CellSummary]:
        """The cells of some parts of the study."""
        return [cell for cell in self.cells.values() if cell.part in parts]


def analyse(records: Sequence[Record]) -> Analysis:
    """Summarise, fit, predict, and find the rules."""
    cells = summarise(records)
    grid = [cell for cell in cells.values() if cell.part == "grid"]
    of_batch = [cell for cell in grid if cell.changes.get("batch_size", BATCH) == BATCH]
    data = collect([cell for cell in of_batch if cell.cell not in HELD_OUT])
    fits = choose(data) if data else []

    def predicted(some: Sequence[CellSummary]) -> list[Prediction]:
        early = next((one for one in fits if not one.family.is_late), None)
        used = [one for one in fits if one is fits[0] or one is early]
        measured = [cell for cell in some if cell.leaks]
        return [predict(one, data, cell) for one in used for cell in measured] if data else []

    return Analysis(
        cells=cells,
        fits=fits,
        predictions=predicted([cells[name] for name in HELD_OUT if name in cells]),
        beyond=predicted([cell for cell in grid if cell not in of_batch]),
        rules=rules(grid),
    )
