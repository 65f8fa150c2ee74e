"""The figures of a comparison: curves, leak, and the one that opens the README.

Every `draw_...` returns a Figure, or None where the records lack what it shows. A `--bn` has the
same colour, line and marker in all of them.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from shuffle_batchnorm.moco.checkpoint import write_atomically

from .style import INK, PAGE, RC, Style, style_of, wrapped
from .summary import Record, Summary, by_bn, diverged, number, summarise
from .tables import DIVERGED, interval, note_of_diverged, written


class Band(NamedTuple):
    """Values over epochs: mean, smallest and largest over the seeds that have one."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(series: Iterable[dict[float, float]]) -> Band:
    """Put the series of several seeds together, each x with the seeds that have a value there."""
    runs = list(series)
    x = sorted({x for run in runs for x in run})
    columns = [[run[at] for run in runs if at in run] for at in x]
    return Band(x, *([of(column) for column in columns] for of in (fmean, min, max)))


def points(record: Record, key: str) -> dict[float, float]:
    """Epoch to value, of the epochs that have a finite one."""
    entries = record.get("curve") or []
    pairs = [(number(entry, "epoch"), number(entry, key)) for entry in entries]
    return {epoch: value for epoch, value in pairs if epoch is not None and value is not None}


def draw_curves(records: Sequence[Record], width: float = PAGE) -> Figure | None:
    """Pretext accuracy and kNN accuracy over epochs, as in MoCo's figure A.1.

    Side by side, or one above the other if there is less width than a page's.
    """
    panels = {"pretext_accuracy": "Pretext accuracy", "knn": "kNN accuracy"}
    shown = [key for key in panels if any(points(record, key) for record in records)]
    if not shown:
        return None
    shape = (1, len(shown)) if width >= PAGE else (len(shown), 1)
    figure = Figure(figsize=(width, 0.6 + 2.3 * shape[0]), layout="constrained")
    for axes, key in zip(figure.subplots(*shape, squeeze=False).flat, shown, strict=True):
        draw_curve(axes, records, key)
        axes.set_title(panels[key], loc="left")
    draw_legend(figure, records)
    return figure


def draw_leak(records: Sequence[Record], width: float = PAGE) -> Figure | None:
    """The leak of every `--bn` with its 95 % interval; dots are seeds."""
    summaries = summarise(records)
    if all(one.leak is None for one in summaries):
        return None
    between = "  " if width >= PAGE else "\n"
    figure = Figure(figsize=(width, 1.0 + 0.42 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, records, before_interval=between)
    heading = f"leak{between}[95 % interval]"
    axes.text(1.03, 1.02, heading, transform=axes.transAxes, weight="bold")
    axes.set_xlabel(f"leak: pretext accuracy,{between[-1]}training batch − fresh batch")
    return figure


def draw_leak_and_cure(records: Sequence[Record]) -> Figure | None:
    """What batch norm gives away, and what the network learns: the figure of the README."""
    if not any(one.leak for one in summarise(records)):
        return None
    has_curve = any(points(record, "knn") for record in records)
    with mpl.rc_context({"font.size": 9.5, "axes.labelsize": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(7.6 if has_curve else 4.2, 3.3), layout="constrained")
        left, *right = figure.subplots(1, 1 + has_curve, squeeze=False)[0]
        draw_bars(left, records)
        left.set_title("What batch norm gives away", loc="left")
        left.set_xlabel("leak (pretext accuracy)")
        for axes in right:
            draw_curve(axes, records, "knn")
            axes.set_title("What the network learns", loc="left")
            axes.set_ylabel("kNN accuracy")
        if has_curve:
            draw_legend(figure, records)
    return figure


# Those of the page, so many inches wide.
ON_PAGE: dict[str, Callable[[Sequence[Record], float], Figure | None]] = {
    "leak": draw_leak,
    "curves": draw_curves,
}
DRAWINGS: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "leak": draw_leak,
    "curves": draw_curves,
    "leak_and_cure": draw_leak_and_cure,
}


def save_figures(folder: Path, records: Sequence[Record]) -> dict[str, Path]:
    """Draw all figures that the records allow, as PNG and PDF; name to the path of the PNG.

    Raises:
        CheckpointError: see `save_figure`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {}
    for name, draw in DRAWINGS.items():
        with mpl.rc_context(RC):
            figure = draw(records)
            if figure is None:
                continue
            saved[name] = folder / f"{name}.png"
            save_figure(figure, saved[name])
            # Without a date, so that the same records give the same file.
            save_figure(figure, folder / f"{name}.pdf", metadata={"CreationDate": None})
    return saved


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as what its file's name says, in one step.

    Raises:
        CheckpointError: the disk is full, say; the old file is as it was.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), **options)
    write_atomically(path, content.getvalue())


def draw_band(axes: Axes, drawn: Band, style: Style) -> None:
    """A line with its markers in its band."""
    axes.fill_between(drawn.x, drawn.low, drawn.high, color=style.colour, alpha=0.16, linewidth=0)
    axes.plot(drawn.x, drawn.mean, markevery=max(1, len(drawn.x) // 8), **line(style))


def line(style: Style) -> dict[str, Any]:
    """A `--bn`'s line and marker, as plots and legends take them."""
    return dict(
        color=style.colour, linestyle=style.line, marker=style.marker, markeredgecolor="white",
        markeredgewidth=0.5,
    )  # fmt: skip


def draw_curve(axes: Axes, records: Sequence[Record], key: str) -> None:
    """All `--bn`, one score: mean over seeds, and a band from the smallest to the largest.

    A cross is where the curve of a run that diverged has its last finite value.
    """
    runs = by_bn(records)
    for bn, some in runs.items():
        style = style_of(bn, list(runs))
        found = [points(record, key) for record in some]
        if any(found):
            draw_band(axes, band(found), style)
        for record, values in zip(some, found, strict=True):
            if values and diverged(record):
                last = max(values)
                cross: dict[str, Any] = dict(markersize=7, markeredgewidth=1.8, zorder=5)
                axes.plot(last, values[last], "x", color=style.colour, **cross)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def draw_bars(axes: Axes, records: Sequence[Record], before_interval: str | None = None) -> None:
    """The leak of every `--bn`: a bar, its interval, a dot per seed, and the line of no leak."""
    summaries = summarise(records)
    bns = [one.bn for one in summaries]
    for y, one in enumerate(summaries):
        words = leak_in_words(one, before_interval)
        axes.text(1.03, y, words, transform=axes.get_yaxis_transform(), va="center")
        leak, colour = one.leak, style_of(one.bn, bns).colour
        if leak is None:
            continue
        axes.barh(y, leak.mean, height=0.62, color=colour, alpha=0.75, zorder=2)
        if leak.low is not None and leak.high is not None:
            ends: dict[str, Any] = dict(fmt="none", ecolor=INK, capsize=4, linewidth=1.3, zorder=4)
            axes.errorbar(
                leak.mean, y, xerr=[[leak.mean - leak.low], [leak.high - leak.mean]], **ends
            )
        good = [run for run in by_bn(records)[one.bn] if not diverged(run)]
        dots = [dot for dot in (number(run, "leak") for run in good) if dot is not None]
        # Spread out, so that they don't hide one another.
        rows = [y + 0.45 * ((k + 0.5) / len(dots) - 0.5) for k in range(len(dots))]
        dot: dict[str, Any] = dict(s=16, facecolor="white", linewidth=1.1, zorder=3)
        axes.scatter(dots, rows, edgecolor=colour, **dot)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(range(len(bns)), [wrapped(bn) for bn in bns])
    axes.set_ylim(len(bns) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def leak_in_words(one: Summary, before_interval: str | None) -> str:
    """The text at the right of a bar, with the interval unless there is None to set before it."""
    if one.leak is None:
        words = DIVERGED if one.diverged == one.runs else "not measured"
    else:
        words = written(one.leak.mean)
        if before_interval is not None and one.leak.low is not None:
            words += before_interval + interval(one.leak.low, one.leak.high)
    return words + (note_of_diverged(one, "\n{}") if one.diverged < one.runs else "")


def draw_legend(figure: Figure, records: Sequence[Record]) -> None:
    """One legend for all panels, below them."""
    summaries = summarise(records)
    bns = [one.bn for one in summaries]
    handles = [Line2D([], [], **line(style_of(bn, bns))) for bn in bns]
    labels = [f"{wrapped(one.bn)}{note_of_diverged(one)}" for one in summaries]
    widths = [9 + max(map(len, label.splitlines())) for label in labels]  # 9 for the line's piece
    room = 15 * figure.get_figwidth() * 0.95  # letters in a line

    def width(rows: int) -> int:  # a column is as wide as its longest label
        return sum(max(widths[k : k + rows]) for k in range(0, len(bns), rows))

    rows = next((k for k in range(1, len(bns)) if width(k) <= room), len(bns))
    where: dict[str, Any] = dict(loc="outside lower center", ncols=math.ceil(len(bns) / rows))
    figure.legend(handles, labels, handlelength=3, **where)
