"""The figures, by what matplotlib was told to draw; how they look is for eyes."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from moco.study.made_up import made_up_records
from shuffle_batchnorm.moco.comparison.style import NARROW
from shuffle_batchnorm.moco.comparison.summary import Estimate
from shuffle_batchnorm.moco.study.analysis import Analysis, analyse
from shuffle_batchnorm.moco.study.figures import (
    DRAWINGS,
    SIZES,
    draw_law,
    draw_layers,
    draw_point,
    draw_settings,
    draw_size,
    save_figures,
)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse([record for record in made_up_records() if record["seed"] < 13])


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def test_the_law_shows_every_cell_and_the_fit(analysis: Analysis) -> None:
    """Catches a size without its curve, and held-out cells that look like the others."""
    left, _ = drawn(draw_law(analysis)).axes
    for n, look in SIZES.items():
        own = [line for line in left.lines if line.get_color() == look["color"]]
        dots = [line for line in own if len(line.get_xdata()) == 1]  # type: ignore[arg-type]
        assert len(dots) == len([cell for cell in analysis.of("grid") if cell.n == n])
        hollow = [line for line in dots if line.get_markerfacecolor() == "white"]
        assert len(hollow) == {16: 1, 32: 1}.get(n, 0)
        [curve] = [line for line in own if len(line.get_xdata()) > 2]  # type: ignore[arg-type]
        assert curve.get_linestyle() == ("--" if n == 64 else "-")


def test_a_point_has_its_interval() -> None:
    """Catches an interval that is drawn upside down."""
    axes = Figure().subplots()
    draw_point(axes, 1.0, Estimate(0.3, 0.05, 0.1, 0.4), SIZES[8])
    [bar] = axes.collections
    assert isinstance(bar, LineCollection)
    assert bar.get_segments()[0] == pytest.approx(np.array([[1.0, 0.1], [1.0, 0.4]]))


def test_settings_have_the_bases_own_value_too(analysis: Analysis) -> None:
    figure = drawn(draw_settings(analysis))
    for axes, ticks in zip(
        figure.axes[3:], (["2", "4", "6", "8"], ["15", "30", "60", "120"]), strict=False
    ):
        assert [label.get_text() for label in axes.get_xticklabels()] == ticks
    [local, *_] = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 4]  # type: ignore[arg-type]
    grid = analysis.cells["n8-B1"].leak
    assert grid is not None
    assert list(local.get_xdata()) == [2, 4, 6, 8]  # type: ignore[arg-type]
    assert list(local.get_ydata())[1] == grid.mean  # type: ignore[arg-type]


def test_layers_go_from_none_to_all(analysis: Analysis) -> None:
    """Catches an order whose ends are not local and regroup."""
    left, _ = drawn(draw_layers(analysis)).axes
    ends = [analysis.cells[name].leak for name in ("n8-B1", "n8-B8")]
    joined = [line for line in left.lines if len(line.get_xdata()) == 5]  # type: ignore[arg-type]
    assert len(joined) == 2
    for line in joined:
        values = list(line.get_ydata())  # type: ignore[arg-type]
        assert [values[0], values[-1]] == [end and end.mean for end in ends]


def test_sizes_show_the_control(analysis: Analysis) -> None:
    left, right = drawn(draw_size(analysis)).axes
    assert sum(line.get_markerfacecolor() == "white" for line in left.lines) == 6
    dashed = [line for line in left.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[8, 64]] * 3  # type: ignore[arg-type]
    assert right.get_title(loc="left") == "kNN accuracy minus that of local"


@pytest.mark.parametrize("name", list(DRAWINGS))
def test_a_phone_has_figures_of_its_width(name: str, analysis: Analysis) -> None:
    """Catches words and numbers that lie on one another, or stick out, where there is less room."""
    figure = drawn(DRAWINGS[name](analysis, width=NARROW))
    assert figure.get_figwidth() == NARROW
    for legend in figure.legends:
        assert figure.bbox.padded(1).containsx(legend.get_window_extent().x1)
    columns = 2 if name == "settings" else 1
    for axes in figure.axes:
        assert axes.get_position().width > 0.6 / columns
        extents = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert not any(a.overlaps(b) for a, b in pairwise(extents)), axes


def test_what_is_not_measured_is_not_drawn() -> None:
    empty = analyse(made_up_records()[:0])
    assert all(draw(empty) is None for draw in DRAWINGS.values())


def test_a_study_that_has_just_begun_is_drawn(tmp_path: Path) -> None:
    """Catches a figure that needs every cell, an interval or a fit."""
    saved = save_figures(tmp_path, analyse(made_up_records(seeds=(10,))[:40:3]))
    assert {"law", "size", "settings"} <= set(saved)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in saved.values())
