"""Fit the law: weighted least squares, chosen by the cells left out, with intervals over seeds.

Everything is computed from the means of cells. A cell's error is the seeds' standard deviation over
the root of their number; as few seeds know a deviation badly, it is taken as a + c · leak, fitted
over all cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.special import gammaln, ndtri, stdtrit

from shuffle_batchnorm.moco.comparison.summary import CONFIDENCE
from shuffle_batchnorm.moco.config import LEAK_BATCHES, LEAK_KEYS

from .law import FAMILIES, Array, Family
from .summary import CellSummary

REPLICATES = 400
SEEDS_TO_FIT = 2  # of a cell; their deviation is known from all cells together
# One key of those that a leak is counted with: no leak is known better than that.
RESOLUTION = 1 / (LEAK_BATCHES * LEAK_KEYS)


@dataclass(frozen=True)
class Data:
    """Cells with the leaks of their seeds, NaN where a run is missing.

    Attributes:
        n: samples in a group, ``[cells]``.
        blocks: B, ``[cells]``.
        leaks: ``[cells, seeds]``.
        spread: a and c of the seeds' standard deviation a + c · leak.
    """

    n: Array
    blocks: Array
    leaks: Array
    spread: Array

    @property
    def means(self) -> Array:
        """The leak of each cell."""
        return np.asarray(np.nanmean(self.leaks, axis=1))

    @property
    def errors(self) -> Array:
        """The standard error of each cell's mean."""
        return self.error(self.means, np.sum(np.isfinite(self.leaks), axis=1))

    def error(self, leak: Array, seeds: Array) -> Array:
        """The standard error of a mean of so many seeds about a leak."""
        deviation = self.spread[0] + self.spread[1] * np.maximum(leak, 0)
        return np.asarray(np.maximum(deviation, RESOLUTION) / np.sqrt(seeds))

    def only(self, kept: Array) -> "Data":
        """Some of the cells."""
        return replace(self, n=self.n[kept], blocks=self.blocks[kept], leaks=self.leaks[kept])


@dataclass(frozen=True)
class Fit:
    """A family's best parameters.

    Attributes:
        family: what was fitted.
        values: its parameters.
        chi2: squared misfit in standard errors, per degree of freedom; 1 if nothing but noise.
        left_out: of each cell, by how many standard errors a fit without it misses it.
        low, high: the 95 % interval of each parameter, over seeds; empty if not asked for, or if
            the cells have too few seeds in common.
    """

    family: Family
    values: Array
    chi2: float
    left_out: Array
    low: Array
    high: Array

    @property
    def score(self) -> float:
        """Root mean square of `left_out`: the smaller, the better it predicts."""
        return float(np.sqrt(np.mean(self.left_out**2)))

    def predict(self, n: Array | float, blocks: Array | float) -> Array:
        """The leak of cells."""
        return np.asarray(self.family.leak(n, blocks, *self.values))


@dataclass(frozen=True)
class Prediction:
    """What a fit said of a cell that it has not seen, and what was measured."""

    cell: str
    family: Family
    leak: float
    low: float
    high: float
    measured: float

    @property
    def is_inside(self) -> bool:
        """Whether the measured mean is in the interval."""
        return self.low <= self.measured <= self.high


def collect(cells: Sequence[CellSummary]) -> Data | None:
    """The cells that have seeds enough; None if these are too few to fit, or all of one size."""
    some = [cell for cell in cells if len(cell.leaks) >= SEEDS_TO_FIT]
    too_few = len(some) <= max(len(family.parameters) for family in FAMILIES) + 1
    if too_few or len({cell.n for cell in some}) < 2:
        return None
    seeds = sorted({seed for cell in some for seed in cell.leaks})
    leaks = np.array([[cell.leaks.get(seed, np.nan) for seed in seeds] for cell in some])
    n, blocks = (np.array([getattr(cell, name) for cell in some], float) for name in "nB")
    return Data(n, blocks, leaks, spread_of(leaks))


def spread_of(leaks: Array) -> Array:
    """Fit the seeds' standard deviation as a + c · leak, a and c at least 0."""
    counts = np.sum(np.isfinite(leaks), axis=1)
    # A standard deviation of few values is too small by this factor in the mean.
    bias = np.sqrt(2 / (counts - 1)) * np.exp(gammaln(counts / 2) - gammaln((counts - 1) / 2))
    deviations = np.nanstd(leaks, axis=1, ddof=1) / bias
    levels = np.maximum(np.nanmean(leaks, axis=1), 0)
    return np.asarray(nnls(np.stack([np.ones_like(levels), levels], axis=1), deviations)[0])


def parameters_of(family: Family, data: Data, means: Array, start: Array | None = None) -> Array:
    """The parameters with the least squares, weighted by the cells' errors.

    Where the cells leave a parameter open, it ends wherever the search is given up.
    """

    def misses(values: Array) -> Array:
        return np.asarray((family.leak(data.n, data.blocks, *values) - means) / data.errors)

    with np.errstate(over="ignore", invalid="ignore"):  # steps too far, which are taken back
        found = least_squares(
            misses, family.start if start is None else start, method="lm", x_scale="jac"
        )
    return np.asarray(found.x)


def fit(family: Family, data: Data) -> Fit:
    """Fit a family to all cells, and once without each."""
    means, errors = data.means, data.errors
    values = parameters_of(family, data, means)
    misses = (means - family.leak(data.n, data.blocks, *values)) / errors
    chi2 = float(np.sum(misses**2) / (len(means) - len(values)))
    left_out = np.empty(len(means))
    for cell in range(len(means)):
        kept = np.arange(len(means)) != cell
        others = parameters_of(family, data.only(kept), means[kept], values)
        predicted = family.leak(data.n[cell], data.blocks[cell], *others)
        left_out[cell] = (means[cell] - predicted) / errors[cell]
    return Fit(family, values, chi2, left_out, np.empty(0), np.empty(0))


def with_intervals(found: Fit, data: Data, replicates: int, seed: int = 0) -> Fit:
    """Draw the seeds again, all cells together, and take the parameters' quantiles.

    As in `measure_leak`, their distances from the estimate are multiplied by √(k / (k − 1)) · t / z
    for k seeds, without which few seeds cover too rarely. Draws that leave a cell without a seed
    don't count.
    """
    k, random = data.leaks.shape[1], np.random.default_rng(seed)
    drawn = []
    for _ in range(replicates):
        leaks = data.leaks[:, random.integers(k, size=k)]
        if np.isfinite(leaks).any(axis=1).all():
            means = np.nanmean(leaks, axis=1)
            drawn.append(parameters_of(found.family, data, means, found.values))
    if len(drawn) < replicates / 2:
        return found
    tail = (1 + CONFIDENCE) / 2
    wider = np.sqrt(k / (k - 1)) * stdtrit(k - 1, tail) / ndtri(tail)
    low, high = np.quantile(drawn, [1 - tail, tail], axis=0)
    low, high = (found.values + wider * (end - found.values) for end in (low, high))
    return replace(found, low=low, high=high)


def choose(data: Data) -> list[Fit]:
    """All families, that with the smallest error of left-out cells first and with intervals."""
    best, *others = sorted((fit(family, data) for family in FAMILIES), key=lambda one: one.score)
    return [with_intervals(best, data, REPLICATES), *others]


def predict(found: Fit, data: Data, cell: CellSummary) -> Prediction:
    """Predict a cell that was not fitted, with a 95 % interval.

    The interval is as wide as left-out cells are missed: their root mean square in standard errors
    times the standard error at the predicted leak, times Student's t for the degrees of freedom. So
    it holds noise of the seeds, of the parameters, and what the family gets wrong.
    """
    leak = found.predict(cell.n, cell.B)
    error = data.error(leak, np.array(len(cell.leaks)))
    freedom = len(data.means) - len(found.values)
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2) * found.score * error)
    measured = float(np.mean(list(cell.leaks.values())))
    ends = float(leak) - half, float(leak) + half
    return Prediction(cell.cell, found.family, float(leak), *ends, measured)
