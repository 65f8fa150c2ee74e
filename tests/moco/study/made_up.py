"""Records of a study that never was: leaks of a known law, with noise."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shuffle_batchnorm.moco.study.cells import CELLS, SEEDS, Cell, planned
from shuffle_batchnorm.moco.study.law import share
from shuffle_batchnorm.moco.study.records import slim

Record = dict[str, Any]
# λ, β and γ of leak = λ·s^β·(n / 8)^−γ.
TRUTH = (0.5, 1.7, 0.6)


def true_leak(n: int, blocks: int) -> float:
    top, beta, gamma = TRUTH
    return float(top * share(n, blocks) ** beta * (n / 8) ** -gamma)


def made_up_records(cells: Sequence[Cell] = CELLS, seeds: Sequence[int] = SEEDS) -> list[Record]:
    records = []
    for run in planned(cells, seeds, Path()):
        noise = random.Random(f"{run.cell.name} {run.seed}")
        record = slim(run, {})
        leak = true_leak(record["n"], record["B"])
        leak += noise.gauss(0, 0.01 + 0.05 * leak)
        record |= dict(
            leak=leak,
            leak_standard_error=0.01,
            leak_interval=[leak - 0.02, leak + 0.02],
            leak_as_trained=0.15 + leak,
            leak_fresh=0.15,
            knn=(0.97 if record["B"] == 1 else 0.98) + noise.gauss(0, 0.002),
            pretext_accuracy=0.2,
            loss=3.0,
            seconds=1.0,
            diverged=False,
        )
        records.append(record)
    return records
