"""The bootstrap interval of batches: its rate, its corrections, its ends."""

from math import sqrt

import pytest
import torch

from probe.known_leaks import one_thread
from shuffle_batchnorm.probe.intervals import batch_interval, student_quantile

__all__ = ["one_thread"]  # a fixture


def _interval(values: torch.Tensor, keys: int = 10**6, seed: int = 0) -> tuple[float, float]:
    return batch_interval(values, keys, confidence=0.95, resamples=500, seed=seed)[1]


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (8, 2.3060), (31, 2.0395)]
)
def test_student_quantile(freedom: int, expected: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batches", [3, 8, 32])
def test_the_interval_covers_at_its_rate(batches: int) -> None:
    """Without the corrections three batches cover in 60 % and eight in 89 %."""
    covered, runs = 0, 600
    for run in range(runs):
        low, high = _interval(0.1 * torch.randn(batches, dtype=torch.float64), seed=run)
        covered += low <= 0 <= high
    assert abs(covered / runs - 0.95) < 3 * sqrt(0.95 * 0.05 / runs), covered / runs


def test_the_standard_error_is_that_of_the_mean_of_batches() -> None:
    values = torch.tensor([0.1, 0.3, 0.2, 0.6], dtype=torch.float64)
    error, (low, high) = batch_interval(values, 99, confidence=0.9, resamples=4000, seed=0)
    assert error == pytest.approx(float(values.std()) / 2)
    assert low < 0.3 < high < 0.3 + 3 * error


def test_few_batches_have_the_interval_of_student() -> None:
    """Of values from a normal distribution; the factor sqrt(b / (b - 1)) is 7 % here."""
    values = 0.1 * torch.special.ndtri((torch.arange(8).double() + 0.5) / 8)
    error, (low, high) = batch_interval(values, 10**6, confidence=0.95, resamples=20000, seed=0)
    assert (high - low) / 2 == pytest.approx(student_quantile(0.95, 7) * error, rel=0.03)


def test_what_no_key_has_shown_may_still_be_there() -> None:
    low, high = _interval(torch.zeros(8, dtype=torch.float64), keys=100)
    assert -low == high == pytest.approx(0.0295, abs=1e-4)  # 0.95^100 is small, 0.97^100 is 5 %


def test_the_interval_stays_between_minus_one_and_one() -> None:
    values = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert _interval(values) == (-1, 1)
