"""Cells: means over the seeds that went well, differences between runs of one seed."""

import math

import pytest

from moco.study.made_up import made_up_records
from shuffle_batchnorm.moco.study.cells import chosen
from shuffle_batchnorm.moco.study.summary import summarise

CELLS = chosen("n8-B[12],n16-B1,n16-B2,depth6-B[12]")


def test_a_cell_has_the_mean_of_its_seeds() -> None:
    records = made_up_records(CELLS)
    cell = summarise(records)["n8-B2"]
    leaks = {r["seed"]: r["leak"] for r in records if r["cell"] == "n8-B2"}
    assert cell.leaks == leaks
    assert (cell.n, cell.B, cell.part, cell.diverged) == (8, 2, "grid", 0)
    assert cell.leak is not None
    assert cell.leak.mean == pytest.approx(sum(leaks.values()) / 5)


def test_a_gain_is_paired_with_local_of_the_same_seed_and_setting() -> None:
    """Catches the twin of another seed, group size or depth."""
    records = made_up_records(CELLS)
    for position, record in enumerate(records):
        offset = {"n8": 0.0, "n16": 0.1, "depth6": 0.2}[record["cell"].partition("-")[0]]
        step = 0.01 if record["B"] == 2 else 0.0
        records[position] = record | {"knn": offset + 0.001 * record["seed"] ** 2 + step}
    for name, cell in summarise(records).items():
        if cell.B == 1:
            assert cell.gain is None
        else:
            assert cell.gain is not None, name
            assert cell.gain.mean == pytest.approx(0.01)
            assert cell.gain.error == pytest.approx(0, abs=1e-9)


def test_diverged_runs_are_counted_and_in_no_mean() -> None:
    records = made_up_records(CELLS)
    bad = next(r for r in records if (r["cell"], r["seed"]) == ("n8-B1", 12))
    bad |= {"leak": None, "knn": math.nan, "diverged": True}
    cells = summarise(records)
    assert cells["n8-B1"].diverged == 1
    assert sorted(cells["n8-B1"].leaks) == [10, 11, 13, 14]
    gain = cells["n8-B2"].gain
    assert gain is not None
    assert math.isfinite(gain.mean)


def test_a_seed_without_its_local_run_has_no_gain() -> None:
    records = [r for r in made_up_records(CELLS) if (r["B"], r["seed"]) != (1, 10)]
    assert (
        summarise(records)["n8-B2"].gain
        == summarise([r for r in records if r["seed"] != 10])["n8-B2"].gain
    )
