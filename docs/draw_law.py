"""Draw docs/law*.png from the records of `make study`.

python docs/draw_law.py
"""

from pathlib import Path

import matplotlib as mpl

from shuffle_batchnorm.moco.comparison.style import RC
from shuffle_batchnorm.moco.study.analysis import analyse
from shuffle_batchnorm.moco.study.figures import DRAWINGS
from shuffle_batchnorm.moco.study.records import read_records

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results" / "study.json"


def main() -> None:
    analysis = analyse(read_records(RECORDS).runs)
    for name, draw in DRAWINGS.items():
        with mpl.rc_context(RC):
            figure = draw(analysis)
            if figure is not None:
                end = "" if name == "law" else f"_{name}"
                figure.savefig(Path(__file__).with_name(f"law{end}.png"))


if __name__ == "__main__":
    main()
