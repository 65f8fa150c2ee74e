"""How the pictures of docs/ are drawn: the colours, lines and letters of a comparison's figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from shuffle_batchnorm.moco.comparison.style import INK, OTHERS, PAGE, RC, STYLES

__all__ = ["GREY", "INK", "LIGHT", "PAGE", "colour", "drawing"]

GREY, LIGHT = "#6b7079", "#e3e5e8"
# What is no `--bn` has one of the colours that are left.
_NAMES = {
    "batch_shuffle": STYLES["batch-shuffle"].colour,
    "SyncBatchNorm": STYLES["sync"].colour,
    "MoCo's shuffle": OTHERS[1].colour,
    "seed": OTHERS[0].colour,
    "split-BN view": OTHERS[2].colour,
}


def colour(name: str) -> str:
    """Return the colour that stands for a mode, a `--bn` or a peer in every picture."""
    if name in STYLES:
        return STYLES[name].colour
    return _NAMES.get(name, LIGHT)


@contextmanager
def drawing(name: str, height: float) -> Iterator[Figure]:
    """Yield a figure as wide as a page, whose letters can be read at 700 pixels; then save it."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(PAGE, height), facecolor="white", layout="constrained")
        yield figure
        figure.savefig(Path(__file__).with_name(name))
