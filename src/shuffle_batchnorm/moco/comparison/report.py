"""From the records of a comparison to its figures and one self-contained page."""

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from shuffle_batchnorm.moco.checkpoint import write_atomically

from .figures import save_figures
from .style import PAGE, style_of
from .summary import Record, check_records, independent, on_a_par, summarise
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

PAGE_NAME = "report.html"


def write_report(
    output: Path,
    records: Sequence[Record],
    *,
    command: str,
    setup: Mapping[str, Any] | None = None,
) -> Path:
    """Draw the figures of a comparison and write its page and its table.

    Writes `figures/*.png` and `*.pdf`, `table.md` and `report.html` into `output`. The page holds
    its figures and asks nothing of the network. It communicates with no other rank.

    Args:
        output: folder; made if it is missing.
        records: runs, as in `results.json`; a key that a run lacks is left out of what is shown.
        command: what reproduces the comparison, to be printed on the page.
        setup: more for the page's table of the set-up: names to values, or to mappings.

    Returns:
        The path of the page.

    Raises:
        ResultsError: `records` is no list of records, or is empty.
        CheckpointError: the disk is full, say.
    """
    runs = check_records(records, "records")
    paths = save_figures(output / "figures", runs)
    pictures = {name: base64.b64encode(p.read_bytes()).decode() for name, p in paths.items()}
    text = render(runs, pictures, command=command, setup=setup or {})
    write_atomically(output / "table.md", markdown_table(runs).encode())
    page = output / PAGE_NAME
    write_atomically(page, text.encode())
    return page


def render(
    records: Sequence[Record],
    pictures: Mapping[str, str],
    *,
    command: str,
    setup: Mapping[str, Any],
) -> str:
    """The page as text: `report.html.jinja` has the words, this has the numbers."""
    summaries = summarise(records)
    bns = [one.bn for one in summaries]
    header, rows = table(summaries)
    return template("report.html.jinja").render(
        summaries=summaries,
        level=on_a_par(summaries),
        independent=independent(records),
        seeds=count_of_seeds(summaries),
        any_diverged=any(one.diverged for one in summaries),
        facts={key: common(records, key) for key in ("epochs", "world_size", "groups")},
        dataset=setup.get("data", {}).get("dataset"),
        pictures=pictures,
        width=PAGE,
        header=header,
        rows=rows,
        colours={bn: style_of(bn, bns).colour for bn in bns},
        notes=notes(records),
        setup=setup,
        command=command,
        run_header=RUN_HEADER,
        runs=[run_row(record) for record in records],
    )


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
