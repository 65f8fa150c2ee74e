"""The study's figures: the leak against blocks, group size, and whatever else was varied.

Every `draw_...` returns a Figure, or None where the cells that it shows are not measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shuffle_batchnorm.moco.comparison.figures import save_figure
from shuffle_batchnorm.moco.comparison.style import INK, OTHERS, PAGE, RC, STYLES
from shuffle_batchnorm.moco.comparison.summary import Estimate

from .analysis import Analysis
from .cells import BATCH, GROUP, HELD_OUT, LAYERS
from .rules import NEGLIGIBLE
from .summary import CellSummary

Look = dict[str, Any]
# From few samples to many, light to dark, each with a marker of its own.
SIZES: dict[int, Look] = {
    4: dict(color="#e69f00", marker="o"),
    8: dict(color="#009e73", marker="s"),
    16: dict(color="#56b4e9", marker="D"),
    32: dict(color="#0072b2", marker="^"),
    64: dict(color="#332288", marker="v"),
}
BLOCKS: dict[int, Look] = {
    1: dict(color=STYLES["local"].colour, marker="o"),
    2: dict(color=OTHERS[0].colour, marker="s"),
    4: dict(color=OTHERS[2].colour, marker="D"),
}
MARK: Look = dict(markeredgecolor="white", markeredgewidth=0.5)
SETTINGS = {"depth": "convolutions", "epochs": "epochs", "temperature": "temperature"}
# What the grid has: the base's own value of each setting.
BASE = {"depth": 4, "epochs": 60, "temperature": 0.07}


def draw_law(analysis: Analysis, width: float = PAGE) -> Figure | None:
    """The leak against the number of blocks, of each group size, with the fit; and near zero."""
    grid = analysis.of("grid")
    if not grid:
        return None
    figure, panels = two_panels(width, 3.5)
    for axes, zoomed in zip(panels, (False, True), strict=True):
        for place, (n, look) in enumerate(SIZES.items()):
            cells = [cell for cell in grid if cell.n == n]
            draw_fit(axes, analysis, n, cells, look)
            shift = 0.07 * (place - 2)  # so that they don't hide one another
            for cell in cells:
                held = cell.cell in HELD_OUT
                draw_point(axes, cell.B + shift, cell.leak, look, hollow=held)
        for one in analysis.predictions:
            cell = analysis.cells[one.cell]
            span: Look = dict(color=INK, linewidth=6, alpha=0.25, solid_capstyle="butt")
            axes.plot([cell.B + 0.07 * (list(SIZES).index(cell.n) - 2)] * 2, [one.low, one.high],
                      **span)  # fmt: skip
        axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
        axes.set_xlabel("blocks B; 1 is local")
        axes.set_xticks(sorted({cell.B for cell in grid}))
        if zoomed:
            axes.axhline(NEGLIGIBLE, color=INK, linewidth=0.8, linestyle=":", zorder=1)
            axes.set_ylim(-0.03, 0.16)
            axes.set_title("The same, near zero", loc="left")
        else:
            axes.set_title("Leak by number of blocks", loc="left")
            axes.set_ylabel("leak")
    draw_legend(figure, {f"n = {n}": look for n, look in SIZES.items()})
    return figure


def draw_fit(
    axes: Axes, analysis: Analysis, n: int, cells: Sequence[CellSummary], look: Look
) -> None:
    """The fitted leak of one group size; dashed where the fit did not see it."""
    if not analysis.fits or not cells:
        return
    blocks = np.arange(1.0, max(cell.B for cell in cells) + 1)
    seen = not any(map(is_large, cells))
    leak = analysis.fits[0].predict(np.full_like(blocks, n), blocks)
    axes.plot(
        blocks, leak, color=look["color"], linewidth=1.1, linestyle="-" if seen else "--", zorder=2
    )


def draw_point(
    axes: Axes, x: float, estimate: Estimate | None, look: Look, *, hollow: bool = False
) -> None:
    """A mean with its 95 % interval."""
    if estimate is None:
        return
    mean, low, high = estimate.mean, estimate.low, estimate.high
    ends = None if low is None or high is None else [[mean - low], [high - mean]]
    face: Look = dict(markerfacecolor="white", markeredgecolor=look["color"]) if hollow else MARK
    axes.errorbar(x, mean, ends, fmt="none", ecolor=look["color"], elinewidth=1, zorder=3)
    axes.plot(x, mean, **look, **face, linestyle="none", zorder=4)


def draw_size(analysis: Analysis, width: float = PAGE) -> Figure | None:
    """The leak against group size without blocks, and what blocks change in kNN accuracy."""
    grid = analysis.of("grid")
    if not grid:
        return None
    figure, (left, right) = two_panels(width, 3.2)
    for blocks, look in BLOCKS.items():
        same = [cell for cell in [*analysis.of("control"), *grid] if blocks == cell.B]
        for large in (False, True):
            points = [(cell.n, cell.leak) for cell in same if is_large(cell) == large]
            draw_line(left, points, look, hollow=large)
    left.set_xscale("log", base=2)
    left.set_xticks(list(SIZES), [str(n) for n in SIZES])
    left.set_xlabel("samples in a group n; hollow: batch 512")
    left.set_title("Leak by group size", loc="left")
    for place, (n, look) in enumerate(SIZES.items()):
        some = [cell for cell in grid if cell.n == n and cell.gain is not None]
        shift = 0.07 * (place - 2)
        draw_line(right, [(cell.B + shift, cell.gain) for cell in some], look)
    right.axhline(0, color=INK, linewidth=0.8, zorder=1)
    right.set_xlabel("blocks B")
    right.set_title("kNN accuracy minus that of local", loc="left")
    looks = {label_of(blocks): look for blocks, look in BLOCKS.items()}
    draw_legend(figure, looks | {f"n = {n}": look for n, look in SIZES.items()})
    return figure


def draw_settings(analysis: Analysis, width: float = PAGE) -> Figure | None:
    """The leak, and kNN accuracy, against depth, epochs and temperature."""
    if not analysis.of(*SETTINGS):
        return None
    narrow = width < PAGE
    figure = Figure(figsize=(width, 6.5 if narrow else 4.5), layout="constrained")
    if narrow:
        panels = figure.subplots(len(SETTINGS), 2, sharex="row", sharey="col").T
    else:
        panels = figure.subplots(2, len(SETTINGS), sharex="col", sharey="row")
    base = [cell for cell in analysis.of("grid") if cell.n == GROUP]
    for column, (name, words) in zip(panels.T, SETTINGS.items(), strict=True):
        some = analysis.of(name)
        for blocks, look in BLOCKS.items():
            values = [(number(cell.changes[name]), cell) for cell in some if blocks == cell.B]
            values += [(BASE[name], cell) for cell in base if blocks == cell.B and values]
            for axes, key in zip(column, ("leak", "knn"), strict=True):
                points = [(x, getattr(cell, key)) for x, cell in sorted(values, key=first)]
                draw_line(axes, points, look)
        column[0].set_title(name.capitalize(), loc="left")
        column[0].axhline(0, color=INK, linewidth=0.8, zorder=1)
        for axes in column if narrow else column[1:]:
            axes.set_xlabel(words)
            axes.tick_params(axis="x", labelrotation=90 * narrow)
        ticks = sorted({number(cell.changes[name]) for cell in some} | {BASE[name]})
        if name != "depth":
            column[1].set_xscale("log")
            column[1].minorticks_off()
        column[1].set_xticks(ticks, [f"{tick:g}".lstrip("0") for tick in ticks])
    for row, words in zip(panels, ("leak", "kNN accuracy"), strict=True):
        for axes in row if narrow else row[:1]:
            axes.set_ylabel(words)
    draw_legend(figure, {label_of(blocks): look for blocks, look in BLOCKS.items()})
    return figure


def draw_layers(analysis: Analysis, width: float = PAGE) -> Figure | None:
    """The leak and kNN accuracy against the number of layers that are converted."""
    some = analysis.of("layers")
    if not some:
        return None
    ends = {0: f"n{GROUP}-B1", len(LAYERS): f"n{GROUP}-B{GROUP}"}
    orders = {"largest": SIZES[32], "smallest": SIZES[4]}
    figure, panels = two_panels(width, 2.7)
    for axes, key in zip(panels, ("leak", "knn"), strict=True):
        for order, look in orders.items():
            cells = {count: analysis.cells.get(name) for count, name in ends.items()}
            cells |= {
                str(cell.changes["layers"]).count(",") + 1: cell
                for cell in some
                if order in cell.cell
            }
            points = [(count, getattr(cells[count], key, None)) for count in sorted(cells)]
            draw_line(axes, points, look)
        axes.set_xticks(range(len(LAYERS) + 1))
        axes.set_xlabel("layers converted")
        axes.set_title("Leak" if key == "leak" else "kNN accuracy", loc="left")
    draw_legend(figure, {f"{order} share first": look for order, look in orders.items()})
    return figure


def draw_fashion(analysis: Analysis, width: float = PAGE) -> Figure | None:
    """The leak and kNN accuracy on Fashion-MNIST against the number of blocks."""
    some = analysis.of("fashion")
    if not some:
        return None
    figure, panels = two_panels(width, 2.7)
    for axes, key in zip(panels, ("leak", "knn"), strict=True):
        for n in sorted({cell.n for cell in some}):
            points = [(cell.B, getattr(cell, key)) for cell in some if cell.n == n]
            draw_line(axes, points, SIZES[n])
        axes.set_xticks(sorted({cell.B for cell in some}))
        axes.set_xlabel("blocks B; 1 is local")
        axes.set_title("Leak" if key == "leak" else "kNN accuracy", loc="left")
    draw_legend(figure, {f"n = {n}": SIZES[n] for n in sorted({cell.n for cell in some})})
    return figure


def two_panels(width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with two panels, side by side in a page's width, else one above the other."""
    rows = 1 if width >= PAGE else 2
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, 2 // rows).flat)


def draw_legend(figure: Figure, looks: dict[str, Look]) -> None:
    """One legend for all panels, below them."""
    handles = [Line2D([], [], **look, **MARK) for look in looks.values()]
    rows = math.ceil(len(looks) / (5 if figure.get_figwidth() >= PAGE else 3))
    where: Look = dict(loc="outside lower center", ncols=math.ceil(len(looks) / rows))
    figure.legend(handles, list(looks), **where)


def draw_line(
    axes: Axes,
    points: Iterable[tuple[float, Estimate | None]],
    look: Look,
    *,
    hollow: bool = False,
) -> None:
    """Means with their intervals, joined; hollow points by a dashed line."""
    known = [(x, estimate) for x, estimate in points if estimate is not None]
    if not known:
        return
    for at, estimate in known:
        draw_point(axes, at, estimate, look, hollow=hollow)
    x, y = zip(*[(at, estimate.mean) for at, estimate in known], strict=True)
    line: Look = dict(linewidth=1.1, linestyle="--" if hollow else "-", zorder=2)
    axes.plot(x, y, color=look["color"], **line)


def is_large(cell: CellSummary) -> bool:
    """Whether a cell has another batch size than the base."""
    return cell.changes.get("batch_size", BATCH) != BATCH


def label_of(blocks: int) -> str:
    """How a legend names a number of blocks."""
    return "local" if blocks == 1 else f"B = {blocks}"


def number(value: object) -> float:
    """A setting as a number."""
    return float(str(value))


def first(pair: tuple[float, CellSummary]) -> float:
    """What points are sorted by."""
    return pair[0]


DRAWINGS: dict[str, Callable[..., Figure | None]] = {
    "law": draw_law,
    "size": draw_size,
    "settings": draw_settings,
    "layers": draw_layers,
    "fashion": draw_fashion,
}


def save_figures(folder: Path, analysis: Analysis) -> dict[str, Path]:
    """Draw what the cells allow; name to the path of the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {}
    for name, draw in DRAWINGS.items():
        with mpl.rc_context(RC):
            figure = draw(analysis)
            if figure is not None:
                saved[name] = folder / f"{name}.png"
                save_figure(figure, saved[name])
    return saved
