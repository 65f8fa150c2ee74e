"""The probe finds leaks that are known; and what it says of networks with real batch norm."""

import re
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe.known_leaks import (
    Signature,
    accuracy_of_pairs,
    convolutional,
    deep_pairs,
    one_thread,
    pool_of_ids,
)
from shuffle_batchnorm import LeakReport, ShuffleBatchNorm, measure_leak
from shuffle_batchnorm.probe import progress as progress_module

__all__ = ["one_thread"]  # a fixture

SMALL: dict[str, Any] = dict(batch_size=16, batches=16, keys_per_batch=8, keys_per_pass=8)


def _probe(encoder: Signature, pool: Tensor, seed: int = 0, **sizes: Any) -> LeakReport:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {**SMALL, "generator": generator, **sizes}
    return measure_leak(encoder.query, encoder.key, pool, None, encoder.queue, **options)


def test_no_leak_is_exactly_none() -> None:
    """Features that do not depend on other samples: nothing to measure, and no uncertainty.

    Dropout is the same in all passes, or it would look like a leak.
    """
    norm = nn.GroupNorm(2, 8)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
    images, queue = torch.randn(40, 3, 6, 6), torch.randn(9, 128)
    report = measure_leak(encoder, encoder, images, torch.relu, queue, **SMALL)
    assert (report.leak, report.standard_error, report.interval) == (0, 0, (0, 0))
    assert report.as_trained == report.fresh > 0
    assert (report.keys, report.batches) == (128, 16)


def test_total_leak() -> None:
    """Keys that are known by their batch alone."""
    report = _probe(Signature(1.0), pool_of_ids(64))
    assert (report.as_trained, report.fresh, report.leak) == (1, 0, 1)
    assert report.interval == pytest.approx((1 - 3 / 128, 1), abs=1e-3)


def test_keys_that_change_without_consequence_leave_the_rule_of_three() -> None:
    """All differences are 0: 128 keys do not prove that there is no leak."""
    report = _probe(Signature(0.0), pool_of_ids(64, known=0.5))
    assert (report.leak, report.standard_error) == (0, 0)
    assert report.interval == pytest.approx((-3 / 128, 3 / 128), abs=1e-3)


@pytest.mark.parametrize("keys_per_pass", [1, 4])
@pytest.mark.parametrize(("exposed", "known"), [(0.4, 0.3), (0.8, 0.5)])
def test_partial_leak(exposed: float, known: float, keys_per_pass: int) -> None:
    sizes: dict[str, Any] = dict(batches=64, keys_per_pass=keys_per_pass)
    report = _probe(Signature(exposed), pool_of_ids(2000, known), **sizes)
    low, high = report.interval
    assert low <= (1 - known) * exposed <= high
    assert high - low < 0.35
    assert report.fresh == pytest.approx(known, abs=0.06)


@pytest.mark.parametrize("batches", [8, 16])
def test_the_interval_covers_at_its_rate(batches: int) -> None:
    """Catches an interval from keys instead of batches (it covers in 45 to 60 %), among others.

    Each run has its own images. 200 runs at 95 %: a standard deviation is 1.5 points.
    """
    exposed, known, runs = 0.5, 0.3, 200
    covered = 0
    for run in range(runs):
        pool = pool_of_ids(200, known, seed=run)
        sizes: dict[str, Any] = dict(
            batches=batches, resamples=500, keys_per_batch=4, keys_per_pass=4
        )
        low, high = _probe(Signature(exposed), pool, seed=run, **sizes).interval
        covered += low <= (1 - known) * exposed <= high
    tolerance = 3 * sqrt(0.05 * 0.95 / runs)
    assert abs(covered / runs - 0.95) < tolerance, covered / runs


@pytest.mark.parametrize("queue_length", [0, 64])
def test_a_deep_network_in_closed_form(queue_length: int) -> None:
    """Twenty layers of real batch norm, with a queue and end to end."""
    channels, keys = 16, 16
    encoder = deep_pairs(channels, depth=20, groups=16)
    images = torch.randn(1000, channels).double()
    queue = torch.randn(queue_length, channels).double().sign() if queue_length else None
    sizes: dict[str, Any] = dict(batch_size=32, batches=64, keys_per_batch=keys, keys_per_pass=keys)
    report = measure_leak(encoder, encoder, images, None, queue, **sizes)
    fresh = accuracy_of_pairs(channels, queue_length or keys - 1)
    low, high = report.interval
    assert report.as_trained > 0.99
    assert report.fresh == pytest.approx(fresh, abs=0.05)
    assert low - 0.01 <= 1 - fresh <= high + 0.01
    assert high - low < 0.1


def _noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def _convolutional_leak(queries: str, keys: str, queue_length: int, **sizes: Any) -> LeakReport:
    """The leak of a network as initialised, with 16 groups of four samples."""
    encoders = [convolutional(mode, groups=16) for mode in (queries, keys)]

    def normalised(encoder: nn.Module) -> Any:
        return lambda x: F.normalize(encoder(x), dim=1)

    images = torch.randn(256, 3, 6, 6)
    queue = None
    if queue_length:
        with torch.no_grad():
            batches = [images[torch.randperm(256)[:64]] for _ in range(queue_length // 64)]
            queue = torch.cat([normalised(encoders[1])(_noisy(x)) for x in batches])
    options: dict[str, Any] = dict(batches=16, keys_per_batch=16, keys_per_pass=16) | sizes
    query, key = map(normalised, encoders)
    return measure_leak(query, key, images, _noisy, queue, batch_size=64, **options)


@pytest.mark.parametrize("queue_length", [0, 128])
def test_local_leaks_and_regroup_does_not(queue_length: int) -> None:
    local = _convolutional_leak("local", "local", queue_length)
    regroup = _convolutional_leak("local", "regroup", queue_length)
    assert local.interval[0] > 0.2, str(local)
    assert regroup.interval[0] < 0 < regroup.interval[1], str(regroup)
    assert abs(regroup.leak) < 0.1, str(regroup)


def test_sync_leaks_to_a_queue() -> None:
    """With a queue of other batches the whole batch is the signature; in it, keys share it."""
    sizes: dict[str, Any] = dict(batches=12, keys_per_batch=8, keys_per_pass=1)
    queued = _convolutional_leak("sync", "sync", 128, **sizes)
    assert queued.interval[0] > 0.02, str(queued)


def test_a_data_set_is_a_pool() -> None:
    encoder = convolutional("local", groups=4)
    images, queue = torch.randn(40, 3, 6, 6), torch.randn(9, 32)
    data = [(image, k % 3) for k, image in enumerate(images)]
    reports = [measure_leak(encoder, encoder, x, None, queue, **SMALL) for x in (images, data)]
    assert reports[0] == reports[1]


def test_the_same_seed_gives_the_same_report() -> None:
    encoder = nn.Sequential(convolutional("local", groups=4), nn.Dropout(0.1))
    images = torch.randn(64, 3, 6, 6)

    def augment(x: Tensor) -> Tensor:
        return x + torch.randn_like(x)

    def report(seed: int | None) -> LeakReport:
        torch.rand(1)  # a global state that has moved on
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return measure_leak(encoder, encoder, images, augment, generator=generator, **SMALL)

    assert report(None) == report(None)
    assert report(3) == report(3) != report(4)


@pytest.mark.parametrize(("batches", "confidence"), [(2, 0.95), (4, 0.9), (7, 0.95)])
def test_few_batches_are_warned_of(batches: int, confidence: float) -> None:
    """Catches an interval that is taken at its word: two batches that agree make it narrow."""
    message = (
        f"measure_leak: {batches} batches are too few for the interval: below 8 it misses the true "
        f"leak more often than its confidence of {100 * confidence:g} % says; take batches=8 or "
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}more$") as caught:
        _probe(Signature(0.5), pool_of_ids(64), batches=batches, confidence=confidence)
    assert [warning.filename for warning in caught] == [__file__]


def test_keys_that_do_not_depend_on_their_batch_need_no_more_batches() -> None:
    """Warnings are errors: catches one of an interval that is exact."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    images, queue = torch.randn(40, 3, 2, 2), torch.randn(9, 8)
    report = measure_leak(encoder, encoder, images, None, queue, **SMALL | {"batches": 2})
    assert report.interval == (0, 0)


@pytest.mark.parametrize("progress", [None, True, False])
def test_progress_is_written_on_stderr(
    progress: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest's stderr is no terminal."""
    monkeypatch.setattr(progress_module, "PAUSE", 0.0)
    _probe(Signature(0.5), pool_of_ids(64), batches=8, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == (7 if progress else 0)
    assert not lines or lines[0].startswith("measure_leak:  12 %, batch 1 of 8, 0:")


def test_the_report_reads_well() -> None:
    report = LeakReport(0.8, 0.5, 0.3, 0.01, (0.28, 0.32), 0.95, 1024, 32)
    assert str(report) == (
        "leak 0.300 ± 0.010 (95 % interval 0.280 to 0.320): top-1 0.800 as trained, "
        "0.500 in a fresh batch; 1024 keys in 32 batches; a leak: at least 0.28 at 95 %"
    )


def test_the_default_device_does_not_matter() -> None:
    """Catches a number drawn, or an interval taken, where it can't be read."""
    encoder = nn.Sequential(nn.Linear(6, 16), ShuffleBatchNorm(16, mode="local", groups=4))
    images, queue = torch.randn(64, 6), torch.randn(32, 16)
    options: dict[str, Any] = dict(batch_size=16, batches=8, keys_per_batch=4, keys_per_pass=4)
    want = measure_leak(encoder, encoder, images, None, queue, **options)
    with torch.device("meta"):
        got = measure_leak(encoder, encoder, images, None, queue, **options)
    assert got == want


@pytest.mark.parametrize(("per_pass", "keys"), [(1, 16), (4, 64)])
def test_the_defaults_are_216_passes(per_pass: int, keys: int) -> None:
    """Catches defaults that take minutes; where keys share a pass there are more of them."""
    calls: list[int] = []

    def encode(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    report = measure_leak(
        encode, encode, torch.randn(128, 4), None, torch.randn(8, 4),
        batch_size=64, keys_per_pass=per_pass,
    )  # fmt: skip
    assert len(calls) == 216
    assert (report.keys, report.batches) == (12 * keys, 12)
