"""The pictures of a comparison: curves, leak, stability, and the one that opens the README.

Every `draw_...` returns a Figure, or None where the records lack what it shows. A `--bn` has the
same colour, line and marker in all of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from .style import INK, PAGE, STYLE, Look, look, wrapped
from .summary import Estimate, Record, Summary, by_bn, diverged, number, summarise
from .tables import written


@dataclass(frozen=True)
class Band:
    """Values over epochs or layers: mean, smallest and largest over the seeds that have one."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(series: Iterable[dict[float, float]], mean: Callable[[list[float]], float]) -> Band:
    """Put the series of several seeds together, each place with the seeds that have one there."""
    runs = list(series)
    places = sorted({place for run in runs for place in run})
    columns = [[run[place] for run in runs if place in run] for place in places]
    return Band(
        places,
        [mean(column) for column in columns],
        [min(column) for column in columns],
        [max(column) for column in columns],
    )


def points(record: Record, key: str) -> dict[float, float]:
    """Epoch to value, of the epochs that have a finite one."""
    found = {}
    for entry in record.get("curve") or []:
        epoch, value = number(entry, "epoch"), number(entry, key)
        if epoch is not None and value is not None:
            found[epoch] = value
    return found


def ratios(record: Record) -> dict[float, float]:
    """Layer, from 1, to the scale of its activations against local's."""
    values = (record.get("stability") or {}).get("ratio") or []
    return {
        place: float(value)
        for place, value in enumerate(values, start=1)
        if isinstance(value, int | float) and math.isfinite(value) and value > 0
    }


def radius_of(record: Record) -> float | None:
    """The spectral radius of a run's mixing, from the record or its stability."""
    return number({**(record.get("stability") or {}), **record}, "spectral_radius")


def geometric_mean(values: list[float]) -> float:
    """The mean that belongs on a logarithmic axis."""
    return math.exp(fmean(math.log(value) for value in values))


def draw_band(axes: Axes, drawn: Band, style: Look) -> None:
    """A line with its markers in its band."""
    axes.fill_between(drawn.x, drawn.low, drawn.high, color=style.colour, alpha=0.16, linewidth=0)
    axes.plot(
        drawn.x, drawn.mean, color=style.colour, linestyle=style.line, marker=style.marker,
        markevery=max(1, len(drawn.x) // 8), markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip


def draw_ends(axes: Axes, records: Sequence[Record], key: str, colour: str) -> None:
    """A cross where the curve of a run that diverged has its last finite value."""
    for record in records:
        found = points(record, key)
        if diverged(record) and found:
            last = max(found)
            axes.plot(
                last, found[last], "x", color=colour, markersize=7, markeredgewidth=1.8, zorder=5
            )


def draw_curve(axes: Axes, records: Sequence[Record], key: str) -> None:
    """All `--bn`, one score: mean over seeds, and a band from the smallest to the largest."""
    runs = by_bn(records)
    for bn, some in runs.items():
        style = look(bn, list(runs))
        found = [points(record, key) for record in some]
        if any(found):
            draw_band(axes, band(found, fmean), style)
            draw_ends(axes, some, key, style.colour)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend(
    figure: Figure, records: Sequence[Record], words: Callable[[str], str], title: str = ""
) -> None:
    """One legend for all panels, below them; `words` says what stands behind a `--bn`."""
    bns = list(by_bn(records))
    styles = [look(bn, bns) for bn in bns]
    handles = [
        Line2D(
            [], [], color=style.colour, linestyle=style.line, marker=style.marker,
            markeredgecolor="white", markeredgewidth=0.5,
        )
        for style in styles
    ]  # fmt: skip
    labels = [f"{wrapped(bn)}{words(bn)}" for bn in bns]
    widths = [9 + max(map(len, label.splitlines())) for label in labels]  # 9 for the line's piece
    room = 15 * figure.get_figwidth()  # letters in a line
    rows = next(
        n for n in range(1, len(bns) + 1) if n == len(bns) or sum(widths) <= n * room * 0.95
    )
    columns = math.ceil(len(bns) / rows)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=3, title=title
    )


def note_of_diverged(records: Sequence[Record]) -> Callable[[str], str]:
    """What a legend says of a `--bn` some of whose runs diverged."""
    counts = {one.bn: (one.diverged, one.runs) for one in summarise(records)}

    def words(bn: str) -> str:
        bad, runs = counts[bn]
        return f" ({bad} of {runs} diverged)" if bad else ""

    return words


def draw_curves(records: Sequence[Record]) -> Figure | None:
    """Pretext accuracy and kNN accuracy over epochs, as in MoCo's figure A.1."""
    panels = {"pretext_accuracy": "Pretext accuracy", "knn": "kNN accuracy"}
    known = {key for key in panels if any(points(record, key) for record in records)}
    if not known:
        return None
    figure = Figure(figsize=(PAGE, 2.9), layout="constrained")
    shown = [key for key in panels if key in known]
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw_curve(axes, records, key)
        axes.set_title(panels[key], loc="left")
    legend(figure, records, note_of_diverged(records))
    return figure


def leak_in_words(one: Summary) -> str:
    """What stands at the right of a bar."""
    suffix = f"\n{one.diverged} of {one.runs} diverged" if one.diverged else ""
    if one.leak is None:
        return "diverged" if one.diverged == one.runs else "not measured" + suffix
    words = written(one.leak.mean)
    if one.leak.low is not None and one.leak.high is not None:
        words += f"  [{written(one.leak.low)}, {written(one.leak.high)}]"
    return words + suffix


def whiskers(leak: Estimate) -> list[list[float]] | None:
    """What errorbar wants: how far the interval goes below and above the mean."""
    if leak.low is None or leak.high is None:
        return None
    return [[leak.mean - leak.low], [leak.high - leak.mean]]


def spread_out(count: int, width: float) -> Iterator[float]:
    """Places around 0 for the dots of a bar, so that they don't hide one another."""
    for place in range(count):
        yield 0.0 if count == 1 else width * (place / (count - 1) - 0.5)


def seeds_of(records: Sequence[Record], bn: str) -> list[float]:
    """The leaks of a `--bn`, one per run that went well."""
    runs = [record for record in by_bn(records)[bn] if not diverged(record)]
    leaks = [number(record, "leak") for record in runs]
    return [leak for leak in leaks if leak is not None]


def draw_bars(axes: Axes, records: Sequence[Record], *, upright: bool) -> None:
    """The leak of every `--bn`: a bar, its interval, a dot per seed, and the line of no leak."""
    summaries = summarise(records)
    bns = [one.bn for one in summaries]
    for place, one in enumerate(summaries):
        above: dict[str, Any] = dict(textcoords="offset points", ha="center", va="bottom")
        if one.leak is None:
            if upright:  # else it stands at the right
                axes.annotate("diverged" if one.diverged else "?", (place, 0), (0, 5), **above)
            continue
        style, error = look(one.bn, bns), whiskers(one.leak)
        dots = seeds_of(records, one.bn)
        places = [place + step for step in spread_out(len(dots), 0.36)]
        dot: dict[str, Any] = dict(
            s=16, facecolor="white", edgecolor=style.colour, linewidth=1.1, zorder=3
        )
        bar: dict[str, Any] = dict(color=style.colour, alpha=0.75, zorder=2)
        ends: dict[str, Any] = dict(fmt="none", ecolor=INK, capsize=4, linewidth=1.3, zorder=4)
        if upright:
            axes.bar(place, one.leak.mean, width=0.62, **bar)
            axes.errorbar(place, one.leak.mean, yerr=error, **ends)
            top = max([0, one.leak.mean, one.leak.high or 0, *dots])
            axes.annotate(written(one.leak.mean), (place, top), (0, 5), **above)
            axes.scatter(places, dots, **dot)
        else:
            axes.barh(place, one.leak.mean, height=0.62, **bar)
            axes.errorbar(one.leak.mean, place, xerr=error, **ends)
            axes.scatter(dots, places, **dot)
    width = max(8, 44 // len(bns)) if upright else 22
    names = [wrapped(bn, width) for bn in bns]
    room = (-0.6, len(bns) - 0.4)
    if upright:
        axes.axhline(0, color=INK, linewidth=1, zorder=1)
        axes.set_xticks(range(len(bns)), names)
        axes.set(xlim=room)
        axes.grid(visible=False, axis="x")
    else:
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        axes.set_yticks(range(len(bns)), names)
        axes.set(ylim=room[::-1])
        axes.grid(visible=False, axis="y")


def draw_leak(records: Sequence[Record]) -> Figure | None:
    """The leak of every `--bn` with its 95 % interval; dots are seeds."""
    summaries = summarise(records)
    if all(one.leak is None for one in summaries):
        return None
    figure = Figure(figsize=(PAGE, 1.0 + 0.42 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, records, upright=False)
    for place, one in enumerate(summaries):
        axes.text(
            1.03, place, leak_in_words(one), transform=axes.get_yaxis_transform(), va="center"
        )
    axes.text(1.03, 1.02, "leak  [95 % interval]", transform=axes.transAxes, weight="bold")
    axes.set_xlabel("leak: pretext accuracy, as trained − amid fresh company")
    axes.tick_params(axis="y", length=0)
    return figure


def draw_stability(records: Sequence[Record]) -> Figure | None:
    """Activation scale of every BN layer against `local`, on a logarithmic axis."""
    runs = by_bn(records)
    found = {bn: [ratios(record) for record in some] for bn, some in runs.items()}
    kept = [record for record in records if any(found[str(record["bn"])])]
    if not kept:
        return None
    figure = Figure(figsize=(PAGE * 0.8, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color=INK, linewidth=1, zorder=1)
    for bn, series in found.items():
        if any(series):
            draw_band(axes, band(series, geometric_mean), look(bn, list(runs)))
    axes.set(yscale="log", xlabel="batch norm layer, from the input")
    axes.set_ylabel("activation scale / that of local")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lowest, highest = axes.get_ylim()
    lowest, highest = min(lowest, 0.5), max(highest, 2.0)  # noise about 1 is no trend
    axes.set_ylim(lowest, highest)
    if highest < 1000 * lowest:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())

    def words(bn: str) -> str:
        radii = [radius_of(record) for record in runs[bn]]
        known = [radius for radius in radii if radius is not None]
        return f": {max(known):.2f}" if known else ""

    legend(figure, kept, words, "spectral radius of who normalises whom")
    return figure


def draw_leak_and_cure(records: Sequence[Record]) -> Figure | None:
    """What batch norm gives away, and what the network learns: the picture of the README."""
    has_leak = any(one.leak for one in summarise(records))
    has_curve = any(points(record, "knn") for record in records)
    if not has_leak:
        return None
    with mpl.rc_context({"font.size": 9.5, "axes.labelsize": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(7.6 if has_curve else 4.2, 3.3), layout="constrained")
        left, *right = figure.subplots(1, 1 + has_curve, squeeze=False)[0]
        draw_bars(left, records, upright=True)
        left.set_title("What batch norm gives away", loc="left")
        left.set_ylabel("leak (pretext accuracy)")
        left.tick_params(axis="x", length=0)
        left.margins(y=0.12)
        for axes in right:
            draw_curve(axes, records, "knn")
            axes.set_title("What the network learns", loc="left")
            axes.set_ylabel("kNN accuracy")
        if has_curve:
            legend(figure, records, note_of_diverged(records))
    return figure


DRAWINGS: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "leak": draw_leak,
    "curves": draw_curves,
    "stability": draw_stability,
    "leak_and_cure": draw_leak_and_cure,
}


def save_figures(folder: Path, records: Sequence[Record]) -> dict[str, Path]:
    """Draw all pictures that the records allow, as PNG and PDF; name to the path of the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {}
    for name, draw in DRAWINGS.items():
        with mpl.rc_context(STYLE):
            figure = draw(records)
            if figure is None:
                continue
            saved[name] = folder / f"{name}.png"
            figure.savefig(saved[name])
            # Without a date, so that the same records give the same file.
            figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return saved
