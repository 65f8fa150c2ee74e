"""Draw docs/formula.png: batch normalisation, and whose statistics it takes.

python docs/draw_formula.py
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

MAIN = r"$y \;=\; \gamma\,\dfrac{x-\mu_S}{\sqrt{\sigma_S^2+\epsilon}}\;+\;\beta$"
STATISTICS = (
    r"$\mu_S=\dfrac{1}{n_S}\sum_{x'\in S}x'$"
    r"$\qquad\qquad$"
    r"$\sigma_S^2=\dfrac{1}{n_S}\sum_{x'\in S}(x'-\mu_S)^2$"
)
LINES = (
    ("Batch normalisation", r"$S$ is the group that $x$ belongs to."),
    ("Shuffled", r"$S$ is another group, or a group dealt from many."),
)


def main() -> None:
    with mpl.rc_context({"mathtext.fontset": "cm", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.2, 3.7), facecolor="white")
        figure.text(0.5, 0.79, MAIN, fontsize=27, ha="center", va="center")
        figure.text(0.5, 0.44, STATISTICS, fontsize=17, ha="center", va="center")
        for height, (name, meaning) in zip((0.19, 0.09), LINES, strict=True):
            figure.text(0.35, height, name, fontsize=12, ha="right", va="center", weight="bold")
            figure.text(0.38, height, meaning, fontsize=12, ha="left", va="center")
        figure.savefig(Path(__file__).with_name("formula.png"), dpi=150)


if __name__ == "__main__":
    main()
