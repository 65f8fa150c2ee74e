"""What is done to all layers of a model at once: offsets, records, running statistics."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import truth
from ranks import run_on_ranks
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    record_statistics,
    shuffle_offset,
    synchronize_running_stats,
)
from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.norm.mixing import MODES


def _model(**kwargs: Any) -> nn.Sequential:
    options: dict[str, Any] = dict(mode="swap", groups=4) | kwargs
    first = ShuffleBatchNorm(3, **options)
    return nn.Sequential(first, nn.BatchNorm1d(3), nn.Sequential(ShuffleBatchNorm(3, **options)))


def _offsets(model: nn.Module) -> list[int]:
    return [m.offset for m in model.modules() if isinstance(m, ShuffleBatchNorm)]


def test_offset_holds_inside_and_nests() -> None:
    """Catches an offset that stays, or that an inner block restores to the wrong one."""
    model = _model(offset=3)
    model[0].register_forward_hook(lambda *_: None)
    with shuffle_offset(model, 0):
        assert _offsets(model) == [0, 0]
        with shuffle_offset(model[2], -1):
            assert _offsets(model) == [0, -1]
        assert _offsets(model) == [0, 0]
    assert _offsets(model) == [3, 3]


def test_offset_is_used_by_the_layers() -> None:
    """Catches a context that changes an attribute that nothing reads."""
    x = torch.randn(16, 3)
    layer = ShuffleBatchNorm(3, mode="regroup", groups=4, offset=1)
    for offset in (0, 3, 1):
        with shuffle_offset(layer, offset):
            y = layer(x)
        exact = truth.shuffled(list(x.chunk(4)), "regroup", offset)
        torch.testing.assert_close(y, torch.cat(exact.outputs))


def test_offset_is_restored_after_an_error() -> None:
    """Catches a model left unshuffled for good by one failed batch."""
    model = _model(offset=3)
    with pytest.raises(ZeroDivisionError), shuffle_offset(model, 0):
        raise ZeroDivisionError
    assert _offsets(model) == [3, 3]
    with (
        pytest.raises(TypeError, match=r"^shuffle_offset: offset must be an int, got 1\.5$"),
        shuffle_offset(model, 1.5),  # type: ignore[arg-type]
    ):
        pass
    assert _offsets(model) == [3, 3]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_records_are_the_truth(mode: str, groups: int, dtype: torch.dtype) -> None:
    """Catches rows of another group, unbiased variances, or records out of a sample's order."""
    x = (torch.randn(16, 3, 5) * torch.arange(1.0, 17).view(-1, 1, 1) + 2).to(dtype)
    layer = ShuffleBatchNorm(3, mode=mode, groups=groups)
    layer.to(torch.float64 if dtype == torch.float64 else torch.float32)
    exact = truth.shuffled(list(x.double().chunk(groups)), mode)
    with record_statistics(layer) as records:
        layer(x)
    [record] = records
    own = torch.stack(exact.own).repeat_interleave(16 // groups, dim=0)
    used = torch.cat([row.expand(n, 2, 3) for rows in exact.used for n, _, row in rows])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for got, want in (
        (record.own_mean, own[:, 0]),
        (record.own_var, own[:, 1]),
        (record.used_mean, used[:, 0]),
        (record.used_var, used[:, 1]),
    ):
        assert got.shape == (16, 3)
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_records_have_names_and_end_with_the_block() -> None:
    """Catches records of plain layers, wrong names, and recording that never stops."""
    model, x = _model(), torch.randn(8, 3)
    with record_statistics(model) as outer:
        model(x)
        with record_statistics(model[2]) as inner:
            model(x)
        model(x)
    model(x)
    assert [r.name for r in outer] == ["0", "2.0"] * 3
    assert [r.name for r in inner] == ["0"]
    assert torch.equal(inner[0].used_mean, outer[3].used_mean)
    with record_statistics(model[0]) as alone:
        model(x)
    assert [r.name for r in alone] == [""]


def test_records_end_with_an_error() -> None:
    """Catches a recording that a failed batch leaves running, at the cost of every later step."""
    model = _model()
    with pytest.raises(ZeroDivisionError), record_statistics(model) as records:
        raise ZeroDivisionError
    model(torch.randn(8, 3))
    assert records == []
    assert all(not m._sinks for m in model.modules() if isinstance(m, ShuffleBatchNorm))


@pytest.mark.parametrize("batch", [8, 5])
@pytest.mark.parametrize("track", [True, False])
def test_records_in_eval_mode(batch: int, track: bool) -> None:
    """Catches eval mode that records nothing, batch statistics, or fails on a batch of any size."""
    layer = ShuffleBatchNorm(3, groups=4, track_running_stats=track)
    layer(torch.randn(8, 3, 2) + 5)
    x = torch.randn(batch, 3, 2)
    with record_statistics(layer) as records:
        layer.eval()(x)
    [record] = records
    groups = x.chunk(4) if batch == 8 else [x]
    own = torch.stack([truth.moments(g) for g in groups])
    own = own.repeat_interleave(batch // len(groups), dim=0)
    whole = truth.moments(x)
    used = torch.stack([*layer.buffers()][:2]) if track else whole
    torch.testing.assert_close(torch.stack([record.own_mean, record.own_var], dim=1), own)
    for got, want in ((record.used_mean, used[0]), (record.used_var, used[1])):
        torch.testing.assert_close(got, want.expand(batch, 3))
    layer.train()(torch.randn(8, 3, 2) - 5)
    torch.testing.assert_close(record.used_mean[0], used[0], msg="changed by a later step")


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_recorded_again(reentrant: bool) -> None:
    """Catches two records for one call of a layer under activation checkpointing."""
    model, x = _model(), torch.randn(8, 3, requires_grad=True)
    with record_statistics(model) as records:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert [r.name for r in records] == ["0", "2.0"]


def _synchronized(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Buffers before and after, the output in eval mode, and what must not have changed."""
    model = nn.Sequential(
        ShuffleBatchNorm(3, mode="local"),
        nn.BatchNorm1d(3),
        ShuffleBatchNorm(3, mode="swap", track_running_stats=False),
        nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3).double()),
    )
    for k in range(dist.get_rank() + 1):
        model[0](torch.randn(4, 3) + k)
    buffers = {k: b for k, b in model.named_buffers() if b.is_floating_point()}
    for k, buffer in enumerate(buffers.values()):
        buffer.add_(k + dist.get_rank())
    model.to(dtype)
    buffers = {k: b for k, b in model.named_buffers() if b.is_floating_point()}
    before = [b.clone() for b in buffers.values()]
    objects = [id(b) for b in buffers.values()]
    synchronize_running_stats(model)
    assert [id(b) for b in buffers.values()] == objects
    for buffer in buffers.values():
        assert buffer.dtype == dtype
    x = torch.ones(2, 3, dtype=dtype)
    output = model[:2].eval()(x)
    return before, [*buffers.values()], output, [model.get_buffer("0.num_batches_tracked")]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_are_averaged(world_size: int, dtype: torch.dtype) -> None:
    """Catches sums for means, layers left out, buffers replaced, other results on every rank."""
    results = run_on_ranks(world_size, _synchronized, dtype)
    before = zip(*(result[0] for result in results), strict=True)
    means = [torch.stack(buffers).double().mean(dim=0) for buffers in before]
    for rank, (_, after, output, [tracked]) in enumerate(results):
        for got, want in zip(after, means, strict=True):
            torch.testing.assert_close(
                got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-5
            )
        assert torch.equal(output, results[0][2])
        assert tracked == rank + 1, "a count is not an average"


def _synchronized_in_a_part() -> list[float]:
    part = dist.new_group([0, 2])
    layer = nn.BatchNorm1d(1)
    mean = layer.get_buffer("running_mean").fill_(dist.get_rank())
    if dist.get_rank() != 1:
        synchronize_running_stats(layer, part)
    first = mean.item()
    synchronize_running_stats(nn.Linear(1, 1))  # nothing to average: no message either
    return [first, mean.item()]


def test_running_statistics_are_averaged_in_a_process_group() -> None:
    """Catches a process group that is ignored, and a model without such layers."""
    assert run_on_ranks(3, _synchronized_in_a_part) == [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]


def _numbers_sent() -> list[int]:
    shared, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.running_mean = shared.running_mean  # one tensor in two layers
    sent, all_sum = [], collectives.all_sum

    def spy(row: Tensor, *args: Any) -> Tensor:
        sent.append(row.numel())
        return all_sum(row, *args)

    collectives.all_sum = spy  # type: ignore[assignment]
    try:
        synchronize_running_stats(nn.Sequential(shared, other, shared))
    finally:
        collectives.all_sum = all_sum
    return sent


def test_running_statistics_travel_once_together() -> None:
    """Catches a message per layer, and buffers of shared layers sent several times."""
    assert run_on_ranks(2, _numbers_sent) == [[9], [9]]


def _synchronized_in_half_precision() -> float:
    layer = ShuffleBatchNorm(1, dtype=torch.float16)
    variance = layer.get_buffer("running_var").fill_(40000)
    synchronize_running_stats(layer)
    return variance.item()


def test_large_variances_in_half_precision() -> None:
    """Catches a sum over ranks in float16, beyond its largest number 65504."""
    assert run_on_ranks(2, _synchronized_in_half_precision) == [40000, 40000]


def test_synchronize_without_ranks_changes_nothing() -> None:
    """Catches a need for an initialised process group."""
    model = _model()
    model(torch.randn(8, 3))
    before = [b.clone() for b in model.buffers()]
    synchronize_running_stats(model)
    for got, want in itertools.zip_longest(model.buffers(), before):
        assert torch.equal(got, want)
    with pytest.raises(TypeError, match=r"^synchronize_running_stats: process_group must be None"):
        synchronize_running_stats(model, "world")
