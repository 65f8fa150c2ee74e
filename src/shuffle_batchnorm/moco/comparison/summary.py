"""What the runs of a comparison say together: a record is one run, a summary is one `--bn`.

Runs that diverged (a loss or a score that is not finite) are counted and left out of every mean: a
network that gives NaN has a leak of 0, and that would read as a cure.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, TypeAlias, TypeGuard

from scipy.special import stdtrit

from shuffle_batchnorm.moco.checkpoint import read_json
from shuffle_batchnorm.moco.config import UserError
from shuffle_batchnorm.probe.verdict import judge

Record: TypeAlias = dict[str, Any]

CONFIDENCE = 0.95
# With fewer seeds than this a spread says too little; the runs' own errors are joined instead.
SEEDS_FOR_SPREAD = 3
BASELINE = "local"  # what the others are compared with, seed by seed
SCORES = ("loss", "knn", "pretext_accuracy", "leak")


class ResultsError(UserError):
    """A file of results, or a list of records, that can't be read as such."""


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    `error` is the standard error, None where it can't be known. `low` and `high` are the 95 %
    interval, None with it.
    """

    mean: float
    error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """The runs of one `--bn`; what no run that went well has is None.

    `scale` is the largest of the key encoder's activations against `local`, over layers and runs;
    `radius` is the spectral radius of the mixing.
    """

    bn: str
    runs: int
    diverged: int
    leak: Estimate | None
    scale: float | None
    radius: float | None
    knn: Estimate | None
    linear: Estimate | None
    pretext_accuracy: Estimate | None
    loss: Estimate | None
    seconds: Estimate | None


def number(record: Record, key: str) -> float | None:
    """The number under `key` if there is a finite one."""
    value = record.get(key)
    return float(value) if is_number(value) else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def diverged(record: Record) -> bool:
    """Whether a run ended with a loss or a score that is not finite; none at all is no sign."""
    if record.get("diverged"):
        return True
    values = (record.get(key) for key in SCORES)
    return any(isinstance(value, float) and not math.isfinite(value) for value in values)


def from_spread(values: Sequence[float]) -> Estimate:
    """Mean of at least two values, the error of it from their spread, Student's interval."""
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
    half = error * float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return Estimate(mean, error, mean - half, mean + half)


def mean_over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error over seeds; one seed has no error.

    Example:
        >>> mean_over_seeds([0.5]).error is None
        True
        >>> round(mean_over_seeds([0.4, 0.5, 0.6]).error, 4)
        0.0577
    """
    if len(values) < 2:
        return Estimate(values[0]) if values else None
    return from_spread(values)


def combine_leaks(
    leaks: Sequence[float],
    errors: Sequence[float | None],
    intervals: Sequence[Sequence[float] | None] = (),
) -> Estimate | None:
    """The leak over seeds, with a 95 % interval.

    With three seeds or more the error is the seeds' own spread, stdev / sqrt(n), and the interval
    is Student's with n − 1 degrees of freedom: it holds for a new seed's mean. With fewer the error
    is that of the runs together, sqrt(Σ error²) / n, and so is each side of the interval from the
    sides of the runs' own intervals, or where these are not known the normal one: it holds for
    these runs alone.

    Example:
        >>> leak = combine_leaks([0.30, 0.28], [0.01, 0.01])
        >>> round(leak.mean, 3), round(leak.error, 5)
        (0.29, 0.00707)
    """
    if not leaks:
        return None
    if len(leaks) >= SEEDS_FOR_SPREAD:
        return from_spread(leaks)
    mean, count = fmean(leaks), len(leaks)
    known = [error for error in errors if error is not None]
    if len(known) < count:
        return Estimate(mean)
    error = math.hypot(*known) / count
    below = above = error * NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    own = [interval for interval in intervals if interval and len(interval) == 2]
    if len(own) == count:
        below = math.hypot(*(leak - low for leak, (low, _) in zip(leaks, own, strict=True))) / count
        above = (
            math.hypot(*(high - leak for leak, (_, high) in zip(leaks, own, strict=True))) / count
        )
    return Estimate(mean, error, mean - below, mean + above)


def leak_over_seeds(runs: Sequence[Record]) -> Estimate | None:
    """The leak of those runs that have one; see `combine_leaks`."""
    measured = [run for run in runs if number(run, "leak") is not None]
    return combine_leaks(
        [float(run["leak"]) for run in measured],
        [number(run, "leak_standard_error") for run in measured],
        [run.get("leak_interval") for run in measured],
    )


def by_bn(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each `--bn`, in the order in which they first come."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(str(record["bn"]), []).append(record)
    return found


def summarise(records: Sequence[Record]) -> list[Summary]:
    """One summary per `--bn`."""
    return [summarise_one(bn, runs) for bn, runs in by_bn(records).items()]


def summarise_one(bn: str, runs: Sequence[Record]) -> Summary:
    """The summary of the runs of one `--bn`."""
    good = [run for run in runs if not diverged(run)]

    def values(key: str) -> list[float]:
        return [value for run in good if (value := number(run, key)) is not None]

    keys = ("knn", "linear", "pretext_accuracy", "loss", "seconds")
    means = {key: mean_over_seeds(values(key)) for key in keys}
    ratios = [ratio for run in good for ratio in (run.get("stability") or {}).get("ratio") or []]
    scale = max(filter(is_number, ratios), default=None)
    radius = max(values("spectral_radius"), default=None)
    leak = leak_over_seeds(good)
    return Summary(bn, len(runs), len(runs) - len(good), leak, scale, radius, **means)


def independent(records: Sequence[Record]) -> set[str]:
    """Which `--bn` have keys that depend on no other sample: all their probes gave [0, 0].

    `measure_leak` gives this interval only if no feature of any key changed.

    Example:
        >>> independent([dict(bn="eman", leak_interval=[0.0, 0.0]), dict(bn="local")])
        {'eman'}
    """
    return {
        bn
        for bn, runs in by_bn(records).items()
        if all(run.get("leak_interval") == [0, 0] for run in runs)
    }


def verdicts(records: Sequence[Record]) -> dict[str, str]:
    """What the interval of each leak says, in words: of each `--bn` that has one."""
    said = {}
    exact, runs = independent(records), by_bn(records)
    for one in summarise(records):
        low, high = (one.leak.low, one.leak.high) if one.leak else (None, None)
        names = "leak_as_trained", "leak_fresh"
        terms = [[number(run, name) for run in runs[one.bn]] for name in names]
        known = [[value for value in values if value is not None] for values in terms]
        # Equal leaks of all seeds have an interval of no width, which is no measurement's.
        is_known = low != high or one.bn in exact
        if low is not None and high is not None and all(known) and is_known:
            trained, fresh = map(fmean, known)
            said[one.bn] = judge((low, high), as_trained=trained, fresh=fresh)
    return said


def paired(records: Sequence[Record], key: str, baseline: str = BASELINE) -> dict[str, Estimate]:
    """What each `--bn` has more than another under `key`, seed by seed: mean, error and interval.

    A seed gives the same weights at the start, order and views to all, so what it does to all of
    them is not in the difference. Only seeds that went well with both count, two or more.

    Example:
        >>> runs = [dict(bn=bn, seed=k, knn=0.1 * k + (bn != "local")) for k in (1, 2) for bn in
        ...         ("local", "regroup")]
        >>> round(paired(runs, "knn")["regroup"].mean, 6)
        1.0
    """
    found = {
        (str(run["bn"]), run["seed"]): value
        for run in records
        if not diverged(run) and (value := number(run, key)) is not None
    }
    differences = {
        bn: [
            value - found[baseline, seed]
            for (other, seed), value in found.items()
            if other == bn and (baseline, seed) in found
        ]
        for bn in by_bn(records)
        if bn != baseline
    }
    return {bn: from_spread(values) for bn, values in differences.items() if len(values) > 1}


def on_a_par(summaries: Sequence[Summary]) -> set[str]:
    """Which `--bn` have the highest kNN accuracy, or can't be told from it.

    A mean is on a par with the highest if their difference is below two standard errors of it.
    Nobody is named where there is nothing to compare, or too few seeds to tell.
    """
    ranked = [
        (one.knn, one.bn)
        for one in summaries
        if one.knn is not None and one.runs - one.diverged >= SEEDS_FOR_SPREAD
    ]
    if len(ranked) < 2:
        return set()
    best = max((knn for knn, _ in ranked), key=lambda knn: knn.mean)
    return {
        bn
        for knn, bn in ranked
        if best.mean - knn.mean <= 2 * math.hypot(best.error or 0.0, knn.error or 0.0)
    }


def tidy(record: Record) -> Record:
    """A record that strict JSON can hold; `diverged` says what its NaNs meant."""
    cleaned: Record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    return cleaned | {"diverged": True} if diverged(record) else cleaned


def check_records(value: Any, source: str) -> list[Record]:
    """`value` if it is a list of records, at least one.

    Raises:
        ResultsError: It is something else; `source` says where it is from.
    """
    if not isinstance(value, list):
        kind = type(value).__name__
        raise ResultsError(f"report: {source} must be a list of records, is a {kind}")
    if not value:
        raise ResultsError(f"report: {source} holds no record, and at least one is needed")
    for position, record in enumerate(value):
        check_record(record, f"record {position} of {source}")
    return value


def check_record(value: Any, source: str) -> Record:
    """`value` if it is a record.

    Raises:
        ResultsError: It is something else; `source` says where it is from.
    """
    if not isinstance(value, dict):
        raise ResultsError(f"report: {source} is a {type(value).__name__}, not an object")
    missing = [key for key in ("bn", "seed") if key not in value]
    if missing:
        raise ResultsError(f"report: {source} has no {missing[0]!r}")
    return value


def read_results(path: Path) -> list[Record]:
    """The records of a `results.json`.

    Raises:
        CheckpointError: The file is missing or is not JSON.
        ResultsError: It is not a list of records.
    """
    return check_records(read_json(path), str(path))
