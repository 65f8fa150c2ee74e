"""From the study's records to its figures, its tables and one self-contained page."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shuffle_batchnorm.moco.checkpoint import write_atomically
from shuffle_batchnorm.moco.comparison.report import template
from shuffle_batchnorm.moco.comparison.style import PAGE
from shuffle_batchnorm.moco.comparison.summary import check_records
from shuffle_batchnorm.moco.config import DataConfig

from . import tables
from .analysis import Analysis, analyse
from .cells import BASE, FASHION_SEEDS
from .figures import save_figures
from .records import Records
from .rules import NEGLIGIBLE

PAGE_NAME, TABLES = "study.html", "tables.md"


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
    paths = save_figures(output / "figures", analysis)
    pictures = {name: base64.b64encode(p.read_bytes()).decode() for name, p in paths.items()}
    write_atomically(output / TABLES, markdown(analysis).encode())
    page = output / PAGE_NAME
    write_atomically(page, render(analysis, records, pictures, command=command).encode())
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
    analysis: Analysis, records: Records, pictures: Mapping[str, str], *, command: str
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
        pictures=pictures,
        width=PAGE,
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
