"""What the study's records say of each cell: means over seeds, and the difference to `local`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shuffle_batchnorm.moco.comparison.summary import (
    Estimate,
    Record,
    diverged,
    leak_over_seeds,
    mean_over_seeds,
    number,
)

# Changes that say what the normalisation of a cell is, and not how it is trained.
_NORM = {"bn", "blocks", "layers"}


@dataclass(frozen=True)
class CellSummary:
    """The runs of one cell; what no run that went well has is None.

    `leaks` has the leak of each seed. `gain` is the kNN accuracy minus that of ``local`` with the
    same seed and everything else the same; None for ``local`` itself.
    """

    cell: str
    part: str
    n: int
    B: int
    changes: dict[str, object]
    leaks: dict[int, float]
    diverged: int
    leak: Estimate | None
    as_trained: Estimate | None
    fresh: Estimate | None
    knn: Estimate | None
    gain: Estimate | None


def summarise(records: Sequence[Record]) -> dict[str, CellSummary]:
    """One summary per cell, in the order in which the cells come."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record["cell"], []).append(record)
    local = {twin(r): number(r, "knn") for r in records if r["bn"] == "local" and not diverged(r)}
    return {cell: _summarise(some, local) for cell, some in runs.items()}


def _summarise(runs: Sequence[Record], local: dict[str, float | None]) -> CellSummary:
    good = [run for run in runs if not diverged(run)]
    measured = [run for run in good if number(run, "leak") is not None]

    def mean(values: Iterable[float | None]) -> Estimate | None:
        return mean_over_seeds([value for value in values if value is not None])

    def gain(run: Record) -> float | None:
        knn, other = number(run, "knn"), local.get(twin(run))
        return None if run["bn"] == "local" or knn is None or other is None else knn - other

    first = runs[0]
    return CellSummary(
        cell=first["cell"],
        part=first["part"],
        n=first["n"],
        B=first["B"],
        changes=first["changes"],
        leaks={run["seed"]: run["leak"] for run in measured},
        diverged=len(runs) - len(good),
        leak=leak_over_seeds(good),
        as_trained=mean(number(run, "leak_as_trained") for run in measured),
        fresh=mean(number(run, "leak_fresh") for run in measured),
        knn=mean(number(run, "knn") for run in good),
        gain=mean(map(gain, good)),
    )


def twin(record: Record) -> str:
    """What a run has in common with that of ``local`` to which it is compared."""
    rest = {name: value for name, value in record["changes"].items() if name not in _NORM}
    return f"{record['seed']} {sorted(rest.items())}"
