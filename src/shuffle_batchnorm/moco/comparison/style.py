"""How figures are drawn: fonts, lines, and one colour, line and marker per `--bn`.

The colours are Okabe and Ito's, and where these end Tol's, which colour-blind readers can tell
apart; lines and markers serve a print in grey. All figures of the project take their colours from
here.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INK = "#22262b"
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a8f98",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # letters stay letters: publishers refuse the other kind
}
PAGE = 6.9  # inches: the width of a page's text, and of two columns of most proceedings
NARROW = 3.75  # inches: what a phone of 400 pixels has room for


@dataclass(frozen=True)
class Style:
    """How one `--bn` is drawn everywhere."""

    colour: str
    line: Any
    marker: str


STYLES = {
    "local": Style("#6b7079", (0, (5, 1.6)), "o"),
    "sync": Style("#009e73", (0, (1, 1.2)), "s"),
    "swap": Style("#d55e00", (0, (6, 1.5, 1, 1.5)), "X"),
    "regroup": Style("#0072b2", "-", "D"),
    "batch-shuffle": Style("#e69f00", (0, (3, 1.2, 1, 1.2, 1, 1.2)), "^"),
    "eman": Style("#882255", (0, (9, 2)), "<"),
    "simclr": Style("#332288", (0, (2, 1, 2, 3)), ">"),
}
# On a dark page, what is too dark there: at least 4 to 1 against it, and still apart.
DARK = {
    INK: "#e4e6e9", "#ffffff": "#16181b", "#e3e5e8": "#34383e", "#8a8f98": "#8a8f98",
    "#6b7079": "#9aa1ab", "#0072b2": "#3d97dd", "#882255": "#cf5c93", "#332288": "#9585ea",
    "#56b4e9": "#9ad4f5", "#8c7a00": "#b8a100",
}  # fmt: skip
OTHERS = (Style("#cc79a7", "-", "v"), Style("#56b4e9", "--", "P"), Style("#8c7a00", "-.", "*"))


def style_of(bn: str, bns: Sequence[str]) -> Style:
    """The fixed style of a `--bn`, or one of a few for a name that isn't ours."""
    if bn in STYLES:
        return STYLES[bn]
    return OTHERS[[name for name in bns if name not in STYLES].index(bn) % len(OTHERS)]


def wrapped(bn: str, width: int = 22) -> str:
    """A name in at most three lines; a dollar sign is one, and begins no formula.

    Example:
        >>> print(wrapped("batch-shuffle", 8))
        batch-
        shuffle
    """
    lines = textwrap.wrap(bn, width, max_lines=3, placeholder="…")
    return "\n".join(lines).replace("$", r"\$") or "?"
