"""Draw docs/leak_and_cure.png and docs/comparison_*.png from the records of both comparisons.

python docs/draw_comparison.py
"""

from pathlib import Path

import matplotlib as mpl

from shuffle_batchnorm.moco.comparison.figures import DRAWINGS
from shuffle_batchnorm.moco.comparison.style import RC
from shuffle_batchnorm.moco.comparison.summary import read_results

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# Picture: the file of records that it is of, and the drawing.
PICTURES = {
    "leak_and_cure": ("comparison_fashion", "leak_and_cure"),
    "comparison_digits": ("comparison", "leak_and_cure"),
    "comparison_curves": ("comparison", "curves"),
}


def main() -> None:
    for name, (results, drawing) in PICTURES.items():
        records = read_results(RESULTS / f"{results}.json")
        with mpl.rc_context(RC):
            figure = DRAWINGS[drawing](records)
            if figure is not None:
                figure.savefig(Path(__file__).with_name(f"{name}.png"))


if __name__ == "__main__":
    main()
