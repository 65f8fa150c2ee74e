"""From the records of a comparison to its figures and one self-contained page."""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shuffle_batchnorm.moco.checkpoint import write_atomically, write_json

from .exports import bibtex, csv_table, latex_table
from .figures import ON_PAGE, save_figures
from .inline import name_of, pictures, variable
from .provenance import provenance
from .style import DARK, style_of
from .summary import Record, check_records, independent, on_a_par, summarise, tidy, verdicts
from .tables import (
    RUN_HEADER,
    count_of_seeds,
    markdown_table,
    notes,
    run_row,
    table,
    with_error,
    written,
)

PAGE_NAME, RESULTS = "report.html", "results.json"
LABELS = {
    "leak": "Bars: the leak of each batch norm with its interval, as in the table Results",
    "curves": "Lines: pretext accuracy and kNN accuracy over epochs",
}


def write_report(
    output: Path,
    records: Sequence[Record],
    *,
    command: str,
    setup: Mapping[str, Any] | None = None,
) -> Path:
    """Draw the figures of a comparison and write its page, its tables and what to cite.

    Writes `figures/*.png` and `*.pdf`, `results.json`, `results.csv`, `table.md`, `table.tex`,
    `references.bib` and `report.html` into `output`. The page holds its figures and asks nothing of
    the network. It communicates with no other rank.

    Args:
        output: folder; made if it is missing.
        records: runs, as in `results.json`; a key that a run lacks is left out of what is shown,
            or said to be unknown.
        command: what reproduces the comparison, to be printed on the page.
        setup: more for the page's table of the set-up: names to values, or to mappings.

    Returns:
        The path of the page.

    Raises:
        ResultsError: `records` is no list of records, or is empty.
        CheckpointError: the disk is full, say.
    """
    runs = [tidy(record) for record in check_records(records, "records")]
    setup = setup or {}
    save_figures(output / "figures", runs)
    drawn = pictures({name: partial(draw, runs) for name, draw in ON_PAGE.items()}, LABELS)
    latex, references = latex_table(runs, dataset_of(setup)), bibtex(runs)
    write_json(output / RESULTS, runs)
    texts = {
        "results.csv": csv_table(runs),
        "table.md": markdown_table(runs),
        "table.tex": latex,
        "references.bib": references,
        PAGE_NAME: render(
            runs, drawn, command=command, setup=setup, latex=latex, bibtex=references
        ),
    }
    for name, text in texts.items():
        write_atomically(output / name, text.encode())
    return output / PAGE_NAME


def render(
    records: Sequence[Record],
    drawn: Mapping[str, Markup],
    *,
    command: str,
    setup: Mapping[str, Any],
    latex: str,
    bibtex: str,
) -> str:
    """The page as text: `report.html.jinja` has the words, this has the numbers."""
    summaries = summarise(records)
    bns = [one.bn for one in summaries]
    header, rows = table(summaries)
    return template("report.html.jinja").render(
        summaries=summaries,
        verdicts=verdicts(records),
        level=on_a_par(summaries),
        independent=independent(records),
        seeds=count_of_seeds(summaries),
        any_diverged=any(one.diverged for one in summaries),
        facts={key: common(records, key) for key in ("epochs", "world_size", "groups")},
        dataset=dataset_of(setup),
        pictures=drawn,
        header=header,
        rows=rows,
        colours={bn: variable(style_of(bn, bns).colour) for bn in bns},
        notes=notes(records),
        setup={**provenance(records), **setup},
        command=command,
        latex=latex,
        bibtex=bibtex,
        run_header=RUN_HEADER,
        runs=[run_row(record) for record in records],
    )


def dataset_of(setup: Mapping[str, Any]) -> str | None:
    """The data set's name, if the set-up has it."""
    name: str | None = setup.get("data", {}).get("dataset")
    return name


def template(name: str, package: str = __package__) -> jinja2.Template:
    """A page's template, of this package or another; it can include what is in this one."""

    def load(wanted: str) -> str:
        place = package if wanted == name else __package__
        return files(place).joinpath(wanted).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(load),
    )
    environment.filters |= {"written": written, "with_error": with_error, "shown": shown}
    environment.globals["dark"] = {name_of(light): dark for light, dark in DARK.items()}
    return environment.get_template(name)


def common(records: Sequence[Record], key: str) -> Any:
    """The value that all records have under `key`; None if they differ or lack it."""
    values = [record.get(key) for record in records]
    return values[0] if all(value == values[0] for value in values) else None


def shown(value: Any) -> str:
    """A setting as a reader writes it, a mapping in one line."""
    if isinstance(value, Mapping):
        return " · ".join(f"{key.replace('_', ' ')} {shown(entry)}" for key, entry in value.items())
    words = {None: "default", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
