"""Draw docs/leak_and_cure.png and docs/comparison_curves.png from the records of `make compare`.

python docs/draw_comparison.py
"""

from pathlib import Path

import matplotlib as mpl

from shuffle_batchnorm.moco.comparison.figures import DRAWINGS
from shuffle_batchnorm.moco.comparison.style import RC
from shuffle_batchnorm.moco.comparison.summary import read_results

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "comparison.json"


def main() -> None:
    records = read_results(RESULTS)
    for drawing, name in {"leak_and_cure": "leak_and_cure", "curves": "comparison_curves"}.items():
        with mpl.rc_context(RC):
            figure = DRAWINGS[drawing](records)
            if figure is not None:
                figure.savefig(Path(__file__).with_name(f"{name}.png"))


if __name__ == "__main__":
    main()
