"""From the study's records to its figures, its tables and one self-contained page."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shuffle_batchnorm.moco.checkpoint import write_atomically
from shuffle_batchnorm.moco.comparison.inline import pictures
from shuffle_batchnorm.moco.comparison.report import template
from shuffle_batchnorm.moco.comparison.summary import check_records
from shuffle_batchnorm.moco.config import DataConfig

from . import tables
from .analysis import Analysis, analyse
from .cells import BASE, FASHION_SEEDS
from .figures import DRAWINGS, save_figures
from .records import Records
from .rules import NEGLIGIBLE

PAGE_NAME, TABLES = "study.html", "tables.md"
LABELS = {
    "law": "Points: the leak against blocks, by group size; lines: the fit",
    "size": "Lines: the leak against group size; kNN accuracy minus that of local",
    "settings": "Lines: leak and kNN accuracy against depth, epochs and temperature",
    "layers": "Lines: leak and kNN accuracy against the number of layers converted",
    "fashion": "Lines: leak and kNN accuracy on Fashion-MNIST against blocks",
}


def write_page(output: Path, records: Records, *, command: str) -> Path:
    """Write ``figures/*.png``, ``tables.md`` and ``study.html``, from the records alone.

    Args:
        output: folder; made if it is missing.
        records: as `read_records` gives them.
        command: what reproduces them, to be printed on the page.

    Returns:
        The path of the page.

    Raises:
        ResultsError: there is no record.
        CheckpointError: the disk is full, say.
    """
    check_records(records.runs, "records")
    analysis = analyse(records.runs)
    save_figures(output / "figures", analysis)
    drawn = pictures({name: partial(draw, analysis) for name, draw in DRAWINGS.items()}, LABELS)
    write_atomically(output / TABLES, markdown(analysis).encode())
    page = output / PAGE_NAME
    write_atomically(page, render(analysis, records, drawn, command=command).encode())
    return page


def markdown(analysis: Analysis) -> str:
    """All tables, for docs/law.md and the terminal."""
    parts: list[tuple[str, tuple[str, ...], tables.Rows]] = [
        ("Leak", *tables.grid(analysis.of("grid"))),
        ("kNN − local", *tables.grid(analysis.of("grid"), "gain")),
        ("Rules", tables.RULES, tables.rule_rows(analysis.rules)),
        ("Families", tables.FAMILIES, tables.family_rows(analysis.fits)),
        ("Predictions", tables.PREDICTIONS, tables.prediction_rows(analysis.predictions)),
        ("Batch 512", tables.PREDICTIONS, tables.prediction_rows(analysis.beyond)),
        ("Cells", tables.CELLS, tables.cell_rows(analysis.cells.values())),
    ]
    texts = (f"{title}\n\n{tables.markdown(header, rows)}\n" for title, header, rows in parts)
    return "\n".join(texts)


def render(
    analysis: Analysis, records: Records, drawn: Mapping[str, Markup], *, command: str
) -> str:
    """The page as text: `study.html.jinja` has the words, this has the numbers."""
    leak_header, leak_rows = tables.grid(analysis.of("grid"))
    # Not the defaults of the day, which may have followed the study.
    setup: dict[str, Any] = {"dataset": DataConfig().dataset, "base": BASE}
    for position, one in enumerate(records.environments, start=1):
        setup[f"environment {position}"] = one
    return template("study.html.jinja", str(__package__)).render(
        runs=len(records.runs),
        cells=analysis.cells,
        fits=analysis.fits,
        predictions=analysis.predictions,
        rules=analysis.rules,
        limit=NEGLIGIBLE,
        fashion_seeds=FASHION_SEEDS,
        pictures=drawn,
        leak_header=leak_header,
        leak_rows=leak_rows,
        rule_header=tables.RULES,
        rule_rows=tables.rule_rows(analysis.rules),
        family_header=tables.FAMILIES,
        family_rows=tables.family_rows(analysis.fits),
        prediction_header=tables.PREDICTIONS,
        prediction_rows=tables.prediction_rows(analysis.predictions),
        beyond_rows=tables.prediction_rows(analysis.beyond),
        cell_header=tables.CELLS,
        cell_rows=tables.cell_rows(analysis.cells.values()),
        setup=setup,
        command=command,
    )
