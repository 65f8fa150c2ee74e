"""From the records of a comparison to its pictures and one self-contained page."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from shuffle_batchnorm.moco.checkpoint import write_atomically

from .figures import save_figures
from .style import STYLE, look
from .summary import Estimate, Record, Summary, by_bn, check_records, on_a_par, summarise
from .tables import (
    HEADER,
    RUN_HEADER,
    count_of_seeds,
    listed,
    markdown_table,
    notes,
    row,
    run_row,
    with_error,
    written,
)

PAGE_NAME = "report.html"
TITLE = "The leak of batch norm in MoCo's key encoder"


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    name: str
    data: str  # the PNG in base64
    inches: float  # its width
    alt: str
    caption: str


def common(records: Sequence[Record], key: str) -> Any:
    """The value that all records have under `key`; None if they differ or lack it."""
    values = [record.get(key) for record in records]
    return values[0] if all(value == values[0] for value in values) else None


def counted(count: int, word: str) -> str:
    """'1 rank', '2 ranks'."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def what_was_done(records: Sequence[Record], dataset: str | None) -> str:
    """The abstract's first sentence."""
    bns = list(by_bn(records))
    how = f" on {dataset}" if dataset else ""
    epochs = common(records, "epochs")
    if isinstance(epochs, int):
        how += f" for {counted(epochs, 'epoch')}"
    ranks, groups = common(records, "world_size"), common(records, "groups")
    where = ""
    if isinstance(ranks, int) and isinstance(groups, int):
        where = f" on {counted(ranks, 'rank')} × {counted(groups, 'group')}"
    seeds = counted(len({record["seed"] for record in records}), "seed")
    many = "with one batch norm" if len(bns) == 1 else f"with {len(bns)} kinds of batch norm"
    return f"MoCo was trained{how}{where} {many} in the key encoder ({listed(bns)}), {seeds} each."


def leak_in_words(bn: str, leak: Estimate) -> str:
    """'0.294 with local (95 % interval 0.286 to 0.303)'."""
    inside = f" (95 % interval {written(leak.low)} to {written(leak.high)})"
    return f"{written(leak.mean)} with {bn}{inside if leak.low is not None else ''}"


def what_leaked(summaries: Sequence[Summary]) -> Iterator[str]:
    """Of whom the interval covers zero, of whom it doesn't, and of whom nothing is known."""
    measured = [(one.bn, one.leak) for one in summaries if one.leak is not None]
    endings = {
        False: (": this interval does not cover zero", ": these intervals do not cover zero"),
        True: (": this interval covers zero", ": these intervals cover zero"),
        None: (", with no interval", ", with no intervals"),
    }
    subject = "The leak"
    for side, (singular, plural) in endings.items():
        some = [leak_in_words(bn, leak) for bn, leak in measured if leak.covers_zero is side]
        if some:
            more = ""
            if side:
                more = "; no leak was found, but one as large as the upper end is not excluded"
            yield f"{subject} is {listed(some)}{singular if len(some) == 1 else plural}{more}."
            subject = "It"
    unknown = [one.bn for one in summaries if one.leak is None and one.diverged < one.runs]
    if unknown:
        yield f"The leak of {listed(unknown)} was not measured."


def what_was_learned(summaries: Sequence[Summary]) -> Iterator[str]:
    """The kNN accuracies, and no more of a ranking than the errors allow."""
    known = [(one.knn, one.bn) for one in summaries if one.knn is not None]
    if not known:
        return
    ranked = sorted(known, key=lambda pair: -pair[0].mean)
    values = [f"{with_error(knn)} with {bn}" for knn, bn in ranked]
    yield f"kNN accuracy on held-out images is {listed(values)}."
    level = on_a_par(summaries)
    if len(level) > 1:
        bns = [bn for _, bn in ranked if bn in level]
        yield f"Between {listed(bns)} the errors allow no ranking."
    elif not level and len(known) > 1:
        yield "There are too few seeds to rank these."


def what_diverged(summaries: Sequence[Summary]) -> Iterator[str]:
    """The runs of which there is nothing else to say."""
    for one in summaries:
        if one.diverged:
            runs = counted(one.runs, "run")
            verb = "is" if one.diverged == 1 else "are"
            yield f"{one.diverged} of {runs} with {one.bn} diverged and {verb} in no mean above."


def abstract(records: Sequence[Record], dataset: str | None = None) -> str:
    """One paragraph that says what was done and what came out, and claims no more."""
    summaries = summarise(records)
    parts = [
        what_was_done(records, dataset),
        *what_leaked(summaries),
        *what_was_learned(summaries),
        *what_diverged(summaries),
    ]
    # A number stays in one line with its error and its unit.
    return " ".join(parts).replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def captions(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """For each figure of the page what a blind reader hears, and the caption."""
    summaries = summarise(records)
    seeds = count_of_seeds(summaries)
    several = seeds != "1 seed"
    lines = f"Lines: mean over {seeds}, band from the smallest to the largest." if several else ""
    cross = ""
    if any(one.diverged for one in summaries):
        cross = "A cross is the last finite value of a run that diverged."
    leak = [
        "Leak: top-1 pretext accuracy of keys encoded in the company that they are trained in,",
        "minus that of the same keys amid fresh company.",
        "Bars: mean with 95 % interval; dots: seeds; vertical line: no leak.",
    ]
    curves = [
        "Pretext accuracy in training and kNN accuracy on held-out images.",
        lines,
        cross,
        "The figure follows A.1 of He et al. (2019).",
    ]
    stability = [
        "Scale of the key encoder's activations in each batch norm layer, relative to the same",
        "weights with plain batch norm (local).",
        lines.replace("mean", "geometric mean"),
        "In the legend the spectral radius of I − M, where M says who normalises whom:",
        "above 1, differences between groups can grow with depth.",
    ]
    said = {
        "leak": ("Bars: the leak of each batch norm with its interval", leak),
        "curves": ("Lines: pretext accuracy and kNN accuracy over epochs", curves),
        "stability": ("Lines: activation scale by layer, relative to local", stability),
    }
    return {name: (alt, " ".join(filter(None, parts))) for name, (alt, parts) in said.items()}


def pictures(paths: Mapping[str, Path], records: Sequence[Record]) -> list[Picture]:
    """The figures of the page, in the order of their captions."""
    found = []
    for name, (alt, caption) in captions(records).items():
        if name in paths:
            png = paths[name].read_bytes()
            inches = int.from_bytes(png[16:20], "big") / STYLE["savefig.dpi"]  # width in pixels
            data = base64.b64encode(png).decode()
            found.append(Picture(name, data, inches, alt, caption))
    return found


def rows_of_setup(setup: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A nested mapping as pairs of a name and one line of text."""
    pairs = []
    for key, value in setup.items():
        if isinstance(value, Mapping):
            text = " · ".join(
                f"{inner.replace('_', ' ')} {shown(entry)}" for inner, entry in value.items()
            )
        else:
            text = shown(value)
        pairs.append((key.replace("_", " "), text))
    return pairs


def shown(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def render(
    records: Sequence[Record],
    drawn: Sequence[Picture],
    *,
    command: str,
    setup: Mapping[str, Any],
) -> str:
    """The page as text."""
    summaries = summarise(records)
    bns = [one.bn for one in summaries]
    level = on_a_par(summaries)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=TITLE,
        abstract=abstract(records, setup.get("data", {}).get("dataset")),
        pictures=drawn,
        header=HEADER,
        rows=[(one.bn, row(one), look(one.bn, bns).colour, one.bn in level) for one in summaries],
        notes=notes(records),
        setup=rows_of_setup(setup),
        command=command,
        run_header=RUN_HEADER,
        runs=[(run_row(record), look(str(record["bn"]), bns).colour) for record in records],
    )


def write_report(
    output: Path,
    records: Sequence[Record],
    *,
    command: str,
    setup: Mapping[str, Any] | None = None,
) -> Path:
    """Draw the figures of a comparison and write its page and its table.

    Writes `figures/*.png` and `*.pdf`, `table.md` and `report.html` into `output`. The page holds
    its pictures and asks nothing of the network. It communicates with no other rank.

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
    text = render(runs, pictures(paths, runs), command=command, setup=setup or {})
    write_atomically(output / "table.md", markdown_table(runs).encode())
    page = output / PAGE_NAME
    write_atomically(page, text.encode())
    return page
