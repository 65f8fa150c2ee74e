"""The study in tables: cells, families, predictions, rules; as rows for the page and Markdown."""

from collections.abc import Iterable, Sequence

from shuffle_batchnorm.moco.comparison.summary import Estimate
from shuffle_batchnorm.moco.comparison.tables import NOTHING, interval, with_error, written

from .fit import Fit, Prediction
from .law import Family, share
from .rules import Rule
from .summary import CellSummary

Rows = list[tuple[str, ...]]

CELLS = (
    "cell", "n", "B", "share", "seeds", "leak", "95 % interval", "as trained", "fresh", "kNN",
    "kNN − local",
)  # fmt: skip
FAMILIES = ("family", "leak", "parameters", "misfit per degree of freedom", "left-out error")
PREDICTIONS = ("cell", "family", "predicted", "95 % interval", "measured", "inside")
LATE = " (late)"
RULES = ("n", "leak of local", "fewest blocks", "samples in a block", "leak", "kNN − local")


def grid(cells: Iterable[CellSummary], key: str = "leak") -> tuple[tuple[str, ...], Rows]:
    """Group sizes as rows and blocks as columns, of an estimate of each cell."""
    found = {(one.n, one.B): getattr(one, key) for one in cells}
    sizes, blocks = (sorted({pair[axis] for pair in found}) for axis in (0, 1))
    header = ("n", *(f"B = {number}" for number in blocks))
    return header, [(str(n), *(with_error(found.get((n, b))) for b in blocks)) for n in sizes]


def ends(estimate: Estimate | None) -> str:
    """The interval of an estimate."""
    return interval(estimate.low, estimate.high) if estimate else NOTHING


def cell_rows(cells: Iterable[CellSummary]) -> Rows:
    """One row per cell."""
    return [
        (
            one.cell,
            str(one.n),
            str(one.B),
            NOTHING if one.part == "layers" else written(float(share(one.n, one.B)), 2),
            f"{len(one.leaks)}{f' + {one.diverged} diverged' if one.diverged else ''}",
            with_error(one.leak),
            ends(one.leak),
            *map(with_error, (one.as_trained, one.fresh, one.knn, one.gain)),
        )
        for one in cells
    ]


def titled(family: Family) -> str:
    """The name of a family, and whether it was added late."""
    return f"{family.name}{LATE if family.is_late else ''}"


def family_rows(fits: Sequence[Fit]) -> Rows:
    """One row per family, the best first, whose parameters have intervals."""
    rows: Rows = []
    for one in fits:
        words = []
        for position, (name, value) in enumerate(
            zip(one.family.parameters, one.values, strict=True)
        ):
            known = len(one.low) > 0
            around = f" {interval(one.low[position], one.high[position])}" if known else ""
            words.append(f"{name} = {written(value, 2)}{around}")
        numbers = written(one.chi2, 2), written(one.score, 2)
        rows.append((titled(one.family), one.family.formula, ", ".join(words), *numbers))
    return rows


def prediction_rows(predictions: Iterable[Prediction]) -> Rows:
    """One row per cell that was predicted."""
    return [
        (
            one.cell,
            titled(one.family),
            written(one.leak),
            interval(one.low, one.high),
            written(one.measured),
            "yes" if one.is_inside else "no",
        )
        for one in predictions
    ]


def rule_rows(rules: Iterable[Rule]) -> Rows:
    """One row per group size."""
    rows: Rows = []
    for one in rules:
        cell = one.cell
        local = with_error(one.local.leak if one.local else None)
        if cell is None:
            rows.append((str(one.n), local, "none measured", *[NOTHING] * 3))
            continue
        size = written(cell.n / cell.B, 1).removesuffix(".0")
        leak = f"{with_error(cell.leak)} {ends(cell.leak)}"
        rows.append((str(one.n), local, str(cell.B), size, leak, with_error(cell.gain)))
    return rows


def markdown(header: Sequence[str], rows: Rows) -> str:
    """A table in Markdown.

    Example:
        >>> print(markdown(("n", "leak"), [("8", "0.5")]))
        | n | leak |
        |---|---|
        | 8 | 0.5 |
    """
    lines = [header, *rows]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    text.insert(1, "|" + "---|" * len(header))
    return "\n".join(text)
