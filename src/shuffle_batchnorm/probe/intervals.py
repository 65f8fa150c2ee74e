"""An interval for a mean of batches, by resampling whole batches."""

import math

import torch
from torch import Tensor


def batch_interval(
    values: Tensor, keys: int, *, confidence: float, resamples: int, seed: int
) -> tuple[float, tuple[float, float]]:
    """Return the standard error of the mean of all batches' values, and a bootstrap interval.

    The keys of a batch share statistics, so whole batches are drawn again, with replacement. The
    quantiles of the resampled means are too close to the mean for few batches, in two ways, and
    their distances from it are multiplied by what corrects both for a normal distribution:
    ``sqrt(b / (b - 1))``, since resampling knows the variance of b values and not of what they
    were drawn from, and Student's quantile over the normal one, since that variance is itself
    uncertain.

    Resampling can't show what never happened: if no key of n changed, its interval is a point. The
    interval is therefore never closer to the mean than ``1 - (1 - confidence)^(1/n)``, about 3 / n
    for 95 %: the largest share of events of which n keys may well have seen none (the *rule of
    three*).

    Args:
        values: ``[b]``, one mean per batch, float64, between -1 and 1.
        keys: n, the number of keys in all batches.
        confidence: between 0 and 1.
        resamples: how often all batches are drawn again.
        seed: of these draws.

    Returns:
        The standard error and the two ends, which stay between -1 and 1.

    Source:
        Rule of three: Hanley and Lippman-Hand 1983, JAMA 249(13). Corrections of the percentile
        interval: Hesterberg 2015, arXiv 1411.5279.
    """
    from statistics import NormalDist  # whose import takes as long as half of this library's

    batches = len(values)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(batches, (resamples, batches), generator=generator, device="cpu")
    mean = values.mean()
    deviations = values[drawn].mean(dim=1) - mean
    tail = (1 - confidence) / 2
    ends = [torch.quantile(deviations, share) for share in (tail, 1 - tail)]
    wider = math.sqrt(batches / (batches - 1))
    wider *= student_quantile(confidence, batches - 1) / NormalDist().inv_cdf(1 - tail)
    unseen = 1 - (1 - confidence) ** (1 / keys)
    low = float(mean) + min(float(ends[0]) * wider, -unseen)
    high = float(mean) + max(float(ends[1]) * wider, unseen)
    standard_error = float(values.std(correction=1)) / math.sqrt(batches)
    return standard_error, (max(low, -1.0), min(high, 1.0))


def student_quantile(confidence: float, freedom: int) -> float:
    """Return t such that Student's variable lies between -t and t with this probability.

    Source:
        Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: the probability as a finite sum.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _student_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(freedom)


def _student_probability(angle: float, freedom: int) -> float:
    """Return the probability that ``|t| < tan(angle) * sqrt(freedom)``."""
    odd = freedom % 2
    power = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += power
        power *= math.cos(angle) ** 2 * (k - 1) / k
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
