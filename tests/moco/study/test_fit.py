"""Fits: planted parameters are found, and intervals hold them as often as they say."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moco.study.made_up import TRUTH, made_up_records, true_leak
from shuffle_batchnorm.moco.study.fit import (
    Data,
    Prediction,
    choose,
    collect,
    fit,
    parameters_of,
    predict,
    spread_of,
    with_intervals,
)
from shuffle_batchnorm.moco.study.law import FAMILIES
from shuffle_batchnorm.moco.study.summary import summarise

PLANTED = FAMILIES[2]
GRID = [(n, b) for n in (4, 8, 16, 32) for b in (1, 2, 3, 4, 6, 8) if b <= n]


def planted(seed: int, noise: float = 1.0) -> Data:
    random = np.random.default_rng(seed)
    n, blocks = np.array(GRID, float).T
    truth = np.array([true_leak(*cell) for cell in GRID])
    deviation = noise * (0.02 + 0.05 * truth)
    leaks = truth[:, None] + deviation[:, None] * random.standard_normal((len(GRID), 5))
    return Data(n, blocks, leaks, spread_of(leaks))


def test_the_planted_family_is_chosen() -> None:
    fits = choose(planted(0, noise=0.3))
    assert fits[0].family == PLANTED
    assert [one.score for one in fits] == sorted(one.score for one in fits)
    assert fits[0].values == pytest.approx(TRUTH, rel=0.1)
    assert 0.4 < fits[0].chi2 < 2
    assert fits[-1].chi2 > 3
    assert len(fits[0].low) == 3
    assert not len(fits[1].low)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Catches intervals for five seeds that are as narrow as for many."""
    any_fit, held, width = fit(PLANTED, planted(0)), [], []
    for seed in range(30):
        data = planted(seed)
        values = parameters_of(PLANTED, data, data.means)
        found = with_intervals(replace(any_fit, values=values), data, replicates=40)
        held.append((found.low < TRUTH) & (np.array(TRUTH) < found.high))
        width.append(found.high - found.low)
    assert 0.88 < np.mean(held) <= 1
    assert np.mean(width) < 0.4


def test_predictions_hold_cells_that_were_not_fitted() -> None:
    """Catches an interval that leaves out the noise of the cell itself."""
    inside = []
    for seed in range(30):
        all_of_it = planted(100 + seed)
        unseen = [GRID.index(cell) for cell in ((16, 3), (32, 2))]
        kept = np.array([position not in unseen for position in range(len(GRID))])
        data = all_of_it.only(kept)
        found = fit(PLANTED, data)
        for position in unseen:
            n, blocks = GRID[position]
            leaks = dict(enumerate(all_of_it.leaks[position]))
            cell: Any = SimpleNamespace(cell="x", n=n, B=blocks, leaks=leaks)
            inside.append(predict(found, data, cell).is_inside)
    assert 0.88 < np.mean(inside) <= 1


@pytest.mark.parametrize(
    ("measured", "inside"), [(0.04, False), (0.05, True), (0.15, True), (0.16, False)]
)
def test_a_mean_is_inside_between_both_ends(measured: float, inside: bool) -> None:
    assert Prediction("n8-B2", PLANTED, 0.1, 0.05, 0.15, measured).is_inside is inside


def test_a_left_out_cell_has_no_part_in_its_prediction() -> None:
    """Catches an error of prediction that is only the misfit."""
    data = planted(0)
    cell = GRID.index((8, 2))
    kept = np.arange(len(GRID)) != cell
    values = parameters_of(PLANTED, data.only(kept), data.means[kept])
    missed = (data.means[cell] - PLANTED.leak(8.0, 2.0, *values)) / data.errors[cell]
    found = fit(PLANTED, data)
    assert found.left_out[cell] == pytest.approx(float(missed), abs=1e-3)
    misfit = (data.means[cell] - found.predict(8, 2)) / data.errors[cell]
    assert abs(missed) > 1.05 * abs(misfit)


def test_the_spread_of_seeds_is_found() -> None:
    """Catches the bias of a standard deviation of few values, and a negative part."""
    levels = np.repeat([0.0, 0.1, 0.5], 3000)
    noise = np.random.default_rng(0).standard_normal((len(levels), 5))
    leaks = levels[:, None] + (0.02 + 0.05 * levels[:, None]) * noise
    assert spread_of(leaks) == pytest.approx([0.02, 0.05], rel=0.03)
    falling = levels[:, None] + (0.05 - 0.09 * levels[:, None]) * noise
    assert spread_of(falling)[1] == 0


def test_cells_with_few_seeds_are_left_out_and_missing_runs_are_not_zero() -> None:
    records = [
        record
        for record in made_up_records()
        if record["cell"] != "n8-B6" or record["seed"] < 11
        if (record["cell"], record["seed"]) != ("n8-B1", 10)
    ]
    cells = [cell for cell in summarise(records).values() if cell.part == "grid"]
    data = collect(cells)
    assert data is not None
    assert len(data.n) == len(cells) - 1
    assert np.isnan(data.leaks).sum() == 1
    assert np.isfinite(data.means).all()
    assert len(choose(data)[0].low) == 3
    assert collect(cells[:4]) is None


def test_one_size_is_too_few_to_fit() -> None:
    """Catches a γ that nothing was measured of, given with an interval of width 0."""
    cells = [c for c in summarise(made_up_records()).values() if c.part == "grid" and c.n == 8]
    assert len(cells) == 6
    assert collect(cells) is None


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_any_leaks_are_fitted(noise: float) -> None:
    """Catches a search without end where only `local` leaks, and errors of zero."""
    random = np.random.default_rng(0)
    n, blocks = np.array(GRID, float).T
    leaks = np.where(blocks == 1, 0.5, 0.0)[:, None] + noise * random.standard_normal(
        (len(GRID), 5)
    )
    data = Data(n, blocks, leaks, spread_of(leaks))
    assert (data.errors > 0).all()
    fits = choose(data)
    assert len(fits) == len(FAMILIES)
    for one in fits:
        assert np.isfinite([*one.values, one.chi2, one.score]).all()
    assert fits[0].predict(8, 1) == pytest.approx(0.5, abs=0.02)
    assert fits[0].predict(8, 4) == pytest.approx(0, abs=0.02)


def test_seeds_that_cells_have_not_in_common_give_no_interval() -> None:
    """Catches quantiles of no draw."""
    data = planted(0)
    pairs = np.full((len(GRID), 2 * len(GRID)), np.nan)
    for cell, leaks in enumerate(data.leaks):
        pairs[cell, 2 * cell : 2 * cell + 2] = leaks[:2]
    best = choose(replace(data, leaks=pairs))[0]
    assert not len(best.low)
    assert not len(best.high)
