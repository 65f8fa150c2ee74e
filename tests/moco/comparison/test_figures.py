"""The figures, by what matplotlib was told to draw; how they look is for eyes."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from moco.comparison.made_up import diverged_record, made_up_record, made_up_records
from shuffle_batchnorm.moco.checkpoint import CheckpointError
from shuffle_batchnorm.moco.comparison.figures import (
    DRAWINGS,
    draw_curves,
    draw_leak,
    draw_leak_and_cure,
    save_figures,
)
from shuffle_batchnorm.moco.comparison.style import NARROW, PAGE, RC, STYLES, wrapped
from shuffle_batchnorm.moco.comparison.summary import summarise


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with mpl.rc_context(RC):
        yield


def drawn(figure: Figure | None) -> list[Axes]:
    assert figure is not None
    figure.draw_without_rendering()
    return list(figure.axes)


def lines(axes: Axes, bn: str) -> list[Any]:
    """The lines in a bn's colour that have more than one point."""
    colour = STYLES[bn].colour
    found: list[Any] = [line for line in axes.lines if line.get_color() == colour]
    return [line for line in found if len(line.get_xdata()) > 1]


def words(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_bars_intervals_and_dots_are_the_numbers() -> None:
    runs = made_up_records()
    (axes,) = drawn(draw_leak(runs))
    for bar, one in zip(axes.patches, summarise(runs), strict=True):
        assert one.leak is not None
        assert bar.get_width() == pytest.approx(one.leak.mean)  # type: ignore[attr-defined]
    ends = [c.get_segments()[0] for c in axes.collections if hasattr(c, "get_segments")]
    leak = summarise(runs)[0].leak
    assert leak is not None
    assert ends[0][:, 0].tolist() == pytest.approx([leak.low, leak.high])
    dots = [np.asarray(c.get_offsets()) for c in axes.collections if not hasattr(c, "get_segments")]
    assert dots[0][:, 0].tolist() == [run["leak"] for run in runs if run["bn"] == "local"]
    assert [0, 0] in [list(np.asarray(line.get_xdata())) for line in axes.lines]  # no leak


def test_a_bn_has_its_colour_whoever_else_is_there() -> None:
    alone = drawn(draw_leak(made_up_records(["regroup"])))[0].patches[0]
    among = drawn(draw_leak(made_up_records()))[0].patches[3]
    assert to_hex(alone.get_facecolor()) == to_hex(among.get_facecolor()) == "#0072b2"


def test_curves_are_means_in_a_band_from_smallest_to_largest() -> None:
    curves = [
        [dict(epoch=1, knn=value), dict(epoch=2, knn=None), dict(epoch=3, knn=0.9)]
        for value in (0.1, 0.3)
    ]
    runs = [made_up_record(seed=k, curve=curve) for k, curve in enumerate(curves)]
    (axes,) = drawn(draw_curves(runs))  # no pretext accuracy, no panel for it
    assert axes.get_title(loc="left") == "kNN accuracy"
    (line,) = lines(axes, "local")
    assert list(line.get_xdata()) == [1, 3]  # only epochs that were evaluated
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.9])
    corners = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert {0.1, 0.3} <= set(corners[corners[:, 0] == 1, 1].tolist())


def test_the_end_of_a_run_that_diverged_has_a_cross_and_a_note() -> None:
    figure = draw_curves([made_up_record("swap", 0), diverged_record("swap", 1)])
    pretext, knn = drawn(figure)
    for axes in (pretext, knn):
        (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert np.asarray(cross.get_xdata()).tolist() == [4]
    assert words(figure) == ["swap (1 of 2 diverged)"]
    runs = [made_up_record("local"), diverged_record("swap")]
    for draw in (draw_leak, draw_leak_and_cure):  # a bar that is not there is no leak of zero
        assert "diverged" in [text.get_text() for text in drawn(draw(runs))[0].texts]


@pytest.mark.parametrize(
    ("missing", "draw"),
    [("curve", draw_curves), ("leak", draw_leak)],
)
@pytest.mark.parametrize("value", [None, "absent"])
def test_what_is_missing_is_not_drawn(missing: str, draw: Any, value: str | None) -> None:
    run = made_up_record() | {missing: None}
    if value == "absent":
        del run[missing]
    assert draw([run]) is None


def test_the_figure_of_the_readme_does_without_a_curve() -> None:
    assert len(drawn(draw_leak_and_cure(made_up_records(["local"], [0])))) == 2
    assert len(drawn(draw_leak_and_cure([made_up_record(curve=[])]))) == 1


WIDTHS = [(draw, PAGE) for draw in DRAWINGS.values()]
WIDTHS += [(partial(draw, width=NARROW), NARROW) for draw in (draw_leak, draw_curves)]


@pytest.mark.parametrize(("draw", "width"), WIDTHS)
def test_nothing_overlaps_or_sticks_out(draw: Callable[..., Figure | None], width: float) -> None:
    """Seven names and a long one beside one another, and legends that fit, on a phone too."""
    long = "regroup-with-the-statistics-of-three-other-groups-and-a-longer-name"
    for bns in (STYLES, ("local", long)):
        figure = draw(made_up_records(bns, diverged={("swap", 1)}))
        (axes, *_) = drawn(figure)
        assert figure is not None
        if width == NARROW:
            assert figure.get_figwidth() == NARROW
        frame = figure.bbox.padded(1)
        for text in [*axes.texts, *(t for box in figure.legends for t in box.get_texts())]:
            extent = text.get_window_extent()
            assert frame.x0 <= extent.x0, text
            assert extent.x1 <= frame.x1, text
        extents = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert not any(a.overlaps(b) for a, b in pairwise(extents))


def test_files_are_those_that_could_be_drawn(tmp_path: Path) -> None:
    runs = made_up_records(["$a$ < b & c", "local"], range(12))
    runs = [{k: v for k, v in run.items() if k != "curve"} for run in runs]
    saved = save_figures(tmp_path / "figures", runs)
    assert set(saved) == {"leak", "leak_and_cure"}
    assert wrapped("$a$") == r"\$a\$"  # not a formula
    with Image.open(saved["leak"]) as image:
        assert image.format == "PNG"
        assert image.width == round(6.9 * 200)
    assert saved["leak"].with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_that_cannot_be_written_is_a_users_matter(tmp_path: Path) -> None:
    """Catches a full disk, say, that ends as a mistake of the program's."""
    (tmp_path / "leak.png" / "in the way").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"can't write .*leak\.png: Is a directory"):
        save_figures(tmp_path, made_up_records())
