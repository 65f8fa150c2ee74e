"""The probe over ranks: the same report on all of them, as in one process; errors end all."""

import contextlib
import io
import re
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from probe.known_leaks import Signature, convolutional, one_thread, pool_of_ids
from ranks import outcomes_on_ranks, run_on_ranks
from shuffle_batchnorm import (
    LeakReport,
    ShuffledEncoder,
    batch_shuffle,
    get_shuffle_state,
    measure_leak,
    set_shuffle_state,
)
from shuffle_batchnorm.probe import progress

__all__ = ["one_thread"]  # a fixture

SIZES: dict[str, Any] = dict(batch_size=24, batches=8, keys_per_batch=12, keys_per_pass=6)


NOISE = 0.02  # of the key encoder's weights


def _images(count: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)


def _encoders(mode: str, groups: int) -> tuple[nn.Module, nn.Module]:
    """A query encoder with local groups; the key encoder is another one, but not by much."""
    query = convolutional("sync" if mode == "sync" else "local", groups).double()
    key = convolutional(mode, groups).double()
    for parameter in key.parameters():
        parameter.data += NOISE * parameter.data.std(correction=0) * torch.randn_like(parameter)
    return query, key


def _report(mode: str, total_groups: int, queue: bool) -> LeakReport:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    query, key = _encoders(mode, total_groups // ranks)
    with torch.no_grad():  # in one group on each rank, so all ranks have the same
        negatives = F.normalize(convolutional("local", 1).double()(_images()))
    return measure_leak(
        lambda x: F.normalize(query(x)),
        lambda x: F.normalize(key(x)),
        _images(),
        queue=negatives if queue else None,
        **SIZES,
    )


@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize("mode", ["local", "regroup", "sync"])
def test_ranks_agree_with_one_process(mode: str, queue: bool) -> None:
    """2 ranks x 3 groups, 3 ranks x 2 groups and 1 rank x 6 groups are the same in float64.

    Catches a rank that keeps or replaces another's samples, or counts its own keys only.
    """
    expected = _report(mode, 6, queue)
    assert expected.as_trained > 0
    assert (expected.leak > 0.1) == (mode == "local" or (mode == "sync" and queue))
    for world_size in (2, 3):
        for report in run_on_ranks(world_size, _report, mode, 6, queue):
            assert report == expected


def _signature(exposed: float) -> LeakReport:
    encoder = Signature(exposed)
    sizes: dict[str, Any] = dict(batch_size=12, batches=24, keys_per_batch=6)
    pool = pool_of_ids(400, known=0.25)
    return measure_leak(encoder.query, encoder.key, pool, None, encoder.queue, **sizes)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_known_leak_over_ranks(world_size: int) -> None:
    """The signature is that of all ranks' samples: all of them have to be fresh at once."""
    reports = run_on_ranks(world_size, _signature, 0.6)
    assert all(report == reports[0] for report in reports)
    low, high = reports[0].interval
    assert low <= 0.75 * 0.6 <= high
    assert reports[0].fresh == pytest.approx(0.25, abs=0.1)


def _said() -> str:
    with (
        mock.patch.object(progress, "PAUSE", 0.0),
        contextlib.redirect_stderr(io.StringIO()) as written,
    ):
        measure_leak(*_encoders("local", 3), _images(), **SIZES, progress=True)
    return written.getvalue()


def test_only_the_first_rank_tells_how_far_it_is() -> None:
    first, *others = run_on_ranks(2, _said)
    assert len(first.splitlines()) == SIZES["batches"] - 1
    assert others == [""]


def _augmented(seed: int) -> tuple[LeakReport, LeakReport, Any]:
    """A shuffled encoder in DistributedDataParallel, and the shuffle state afterwards."""
    query, key = _encoders("local", 4)
    query = DistributedDataParallel(query)
    wrapped = ShuffledEncoder(key)
    set_shuffle_state((9, 4))
    reports = []
    for _ in range(2):
        torch.manual_seed(dist.get_rank())
        generator = torch.Generator().manual_seed(seed)

        def augment(x: Tensor) -> Tensor:
            return x + 0.3 * torch.randn_like(x)

        reports.append(
            measure_leak(query, wrapped, _images(), augment, generator=generator, **SIZES)
        )
    return reports[0], reports[1], get_shuffle_state()


def test_a_shuffled_encoder_repeats_itself() -> None:
    """Permutations belong to what the seed decides; the group's own go on where they were."""
    results = run_on_ranks(3, _augmented, 1)
    first = results[0][0]
    for one, other, state in results:
        assert one == other == first
        assert state == (9, 4)
    assert run_on_ranks(3, _augmented, 2)[0][0] != first


def _train(probe: bool) -> list[Tensor]:
    model = DistributedDataParallel(_encoders("regroup", 2)[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rank = dist.get_rank()
    for step in range(3):
        model(_images()[8 * step + 4 * rank :][:4]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if probe:
            measure_leak(model, model, _images(), **SIZES)
    return list(model.state_dict().values())


def test_training_goes_on_as_without_the_probe() -> None:
    """DistributedDataParallel sends its buffers after a pass with gradients only."""
    for with_probe, without in zip(
        run_on_ranks(2, _train, True), run_on_ranks(2, _train, False), strict=True
    ):
        assert all(map(torch.equal, with_probe, without))


def _not_finite(x: Tensor) -> Tensor:
    return x.flatten(1) / (0 if dist.get_rank() == 1 else 1)


def _raises(x: Tensor) -> Tensor:
    if dist.get_rank() == 1:
        raise OverflowError("too large")
    y: Tensor = batch_shuffle(x.flatten(1))[0]
    return y


def _wide(x: Tensor) -> Tensor:
    return x.flatten(1)[:, : 9 - dist.get_rank() % 2]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _call(kind: str, bad: bool) -> Any:
    images, queue, options = _images(), torch.randn(5, 108), {**SIZES}
    query, key = _flat, _flat
    if kind == "encoder not finite":
        key = _not_finite
    elif kind == "encoder raises":
        key = _raises
    elif kind == "other width":
        return measure_leak(_wide, _wide, images, **options)
    elif not bad:
        pass
    elif kind == "batch size":
        options["batch_size"] = 25
    elif kind == "queue":
        queue = queue[0]
    elif kind == "images in another order":
        images = images.flip(0)
    elif kind == "seed":
        options["generator"] = torch.Generator().manual_seed(8)
    elif kind == "sizes":
        options["keys_per_batch"] = 18
    if kind == "seed" and not bad:
        options["generator"] = torch.Generator().manual_seed(7)
    return measure_leak(query, key, images, None, queue, **options)


# What rank 1 raises, and what the others do.
ERRORS = {
    "batch size": ("batch_size 25, which counts", "rank 1 rejected its input: measure_leak: batch"),
    "queue": (r"queue must be \[K, D\], got shape \(108,\)", "rank 1 rejected its input: .* queue"),
    "images in another order": ("ranks disagree on images: .* sum", "ranks disagree on images"),
    "seed": ("ranks disagree on seed", "ranks disagree on seed: .* on rank 0, .* on rank 1"),
    "sizes": ("ranks disagree on keys: 12 on rank 0, 18 on rank 1", "ranks disagree on keys"),
    "encoder not finite": (
        "encode_key returned features that are not finite",
        "rank 1 rejected its input: measure_leak: encode_key returned features that are not fin",
    ),
    "other width": ("ranks disagree on features: 9 on rank 0, 8 on", "ranks disagree on features"),
}


def _fails(kind: str) -> tuple[str, float]:
    batch_shuffle(torch.zeros(2))
    start = time.monotonic()
    text = "nothing"
    try:
        _call(kind, dist.get_rank() == 1)
    except (TypeError, ValueError, RuntimeError) as error:
        text = str(error)
    seconds = time.monotonic() - start
    batch_shuffle(torch.zeros(2))  # the group can go on
    return text, seconds


@pytest.mark.parametrize("kind", ERRORS)
def test_what_one_rank_rejects_ends_all(kind: str) -> None:
    """Catches a rank that raises alone, and one that hangs."""
    for rank, (text, seconds) in enumerate(run_on_ranks(3, _fails, kind)):
        assert re.search(ERRORS[kind][rank != 1], text), text
        assert seconds < 4


def test_an_encoder_that_raises_on_one_rank_ends_all() -> None:
    """The peers wait inside their encoders, for the rank that has left its own."""
    start = time.monotonic()
    outcomes = outcomes_on_ranks(3, _call, "encoder raises", bad=True)
    assert isinstance(outcomes[1], OverflowError)
    for rank in (0, 2):
        assert "rank 1 stopped: measure_leak: too large" in str(outcomes[rank])
    assert time.monotonic() - start < 20  # seconds; the group's timeout is 30
