"""Hard numbers: errors against float64 are those of nn.BatchNorm2d, group by group."""

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from shuffle_batchnorm import ShuffleBatchNorm, shuffle_batch_norm
from shuffle_batchnorm.kernels import reference
from shuffle_batchnorm.kernels.rows import merge_moments
from shuffle_batchnorm.kernels.select import select
from truth import gradient

FLOAT, HALF = torch.float32, torch.bfloat16


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "mean of 100 deviations": (lambda: _randn(16, 8, 9, 9) + 1e2, FLOAT),
    "mean of 10,000 deviations": (lambda: _randn(16, 8, 9, 9) + 1e4, FLOAT),
    "bfloat16, mean of 100 deviations": (lambda: _randn(16, 8, 9, 9) + 1e2, HALF),
    "values of 1e30": (lambda: _randn(16, 8, 9, 9) * 1e30, FLOAT),
    "a mean of 1e30": (lambda: _randn(16, 8, 9, 9) * 1e27 + 1e30, FLOAT),
    "values of 1e-25": (lambda: _randn(16, 8, 9, 9) * 1e-25, FLOAT),
    "a million values per plane": (lambda: _randn(4, 1, 1000, 1000) + 3, FLOAT),
    "one channel": (lambda: _randn(4, 1, 300, 300) + 3, FLOAT),
    "one value per plane": (lambda: _randn(64, 8, 1, 1) + 3, FLOAT),
    "few values, mean of 10,000 deviations": (lambda: _randn(8, 64, 1, 1) + 1e4, FLOAT),
    "one sample per group": (lambda: _randn(4, 8, 9, 9) + 3, FLOAT),
    "an outlier first": (lambda: _with_outlier(_randn(16, 8, 9, 9)), FLOAT),
}


def _with_outlier(x: Tensor) -> Tensor:
    x[0, :, 0, 0] = 1e4
    return x


def _step(layers: list[nn.Module], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a batch cut for some layers that share their parameters."""
    x = x.clone().requires_grad_()
    chunks = zip(layers, x.chunk(len(layers)), strict=True)
    y = torch.cat([layer(chunk) for layer, chunk in chunks])
    y.backward(dy)
    return {"output": y.detach(), "gradient": gradient(x)}


def _errors(layers: list[nn.Module], x: Tensor, dy: Tensor) -> dict[str, float]:
    """Distances to the same step in float64, relative to its size."""
    exact = _step(copy.deepcopy(layers), x.double(), dy.double())
    got = _step([layer.to(FLOAT) for layer in layers], x, dy)
    return {
        name: float((got[name].double() - value).norm() / value.norm())
        for name, value in exact.items()
    }


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_errors_are_those_of_batch_norm(
    case: tuple[Callable[[], Tensor], torch.dtype], channels_last: bool
) -> None:
    """Catches raw moments, sums one after the other in float32, squares that overflow."""
    x = case[0]().to(case[1])
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    channels = x.shape[1]
    # Not noise alone: the part of the gradient that is subtracted again must be there.
    distance = x.double() - x.double().mean(dim=(0, 2, 3), keepdim=True)
    dy = torch.randn_like(x) + (distance / distance.std()).to(x.dtype)
    # torch's own error is by luck now and then: no digit less is lost than it may lose.
    floor = 8 * torch.finfo(case[1]).eps
    for groups in (1, 4) if x[0, 0].numel() > 1 or len(x) > 4 else (1,):
        theirs = _errors([nn.BatchNorm2d(channels).double() for _ in range(groups)], x, dy)
        for mode in ("local", "swap", "regroup"):
            ours = _errors([ShuffleBatchNorm(channels, mode=mode, groups=groups).double()], x, dy)
            for name, error in ours.items():
                limit = (2 if mode == "local" else 4) * theirs[name] + floor
                assert error <= limit, f"{mode}, {groups} groups, {name}: {error:.1e}"


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_errors_of_transposed_lines_are_those_of_batch_norm(mean: float) -> None:
    """Catches channels_last of any length added one after the other, as after a linear layer."""
    x = (_randn(4, 40_000, 3) + mean).float().transpose(1, 2)
    dy = torch.randn_like(x) + (x - mean)
    theirs = _errors([nn.BatchNorm1d(3).double()], x, dy)
    ours = _errors([ShuffleBatchNorm(3, mode="local").double()], x, dy)
    for name, error in ours.items():
        assert error <= 4 * theirs[name] + 1e-6, f"{name}: {error:.1e}, theirs {theirs[name]:.1e}"


def test_estimators_run_the_layer_on_tensors_without_numbers() -> None:
    """Catches a kernel that looks at its numbers, which a fake tensor has not; and no channels."""
    with FakeTensorMode():
        layer = ShuffleBatchNorm(4, mode="regroup", groups=2)
        layer(torch.randn(8, 4, 5, 5, requires_grad=True)).sum().backward()
    empty = torch.randn(8, 0, 3, 3, requires_grad=True)
    for mode in ("local", "sync", "swap", "regroup"):
        y = shuffle_batch_norm(empty, None, None, training=True, mode=mode, groups=2)
        y.sum().backward()
        assert y.shape == gradient(empty).shape == empty.shape


@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
def test_a_traced_layer_is_the_layer(mode: str) -> None:
    """Catches a kernel that looks at numbers where a graph is made of its operations."""
    layer, x = ShuffleBatchNorm(4, mode=mode, groups=2), torch.randn(8, 4, 5, 5)
    with torch.no_grad():
        traced = make_fx(copy.deepcopy(layer))(x)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 5, 5)], ids=str)
def test_a_trace_with_symbolic_sizes_is_the_function(mode: str, shape: tuple[int, ...]) -> None:
    """Catches a cache whose key is a batch's size, a symbol; and aten's batch norm in the graph."""

    def normalised(x: Tensor) -> Tensor:
        return shuffle_batch_norm(x, None, None, training=True, mode=mode, groups=2)

    x = torch.randn(shape)
    traced = make_fx(normalised, tracing_mode="symbolic")(x)
    torch.testing.assert_close(traced(x), normalised(x))


class _Named(Tensor):
    """A subclass that all its results belong to."""


@pytest.mark.parametrize("kind", [Tensor, _Named])
def test_groups_far_apart_are_pooled_whatever_the_tensor_is_called(kind: type[Tensor]) -> None:
    """Catches squares of 1e30, and an exact type where a subclass will do."""
    x = torch.tensor([[1e30], [-1e30], [2e30], [3e30]]).as_subclass(kind)  # groups 0, 3 and 2, 1
    y = shuffle_batch_norm(x, None, None, training=True, mode="regroup", groups=2)
    assert type(y) is kind
    torch.testing.assert_close(y.as_subclass(Tensor)[:, 0], torch.tensor([-1.0, -1.0, 1.0, 1.0]))


def test_tensors_without_memory_or_values_pass() -> None:
    """Catches a context that a meta tensor has not, and statistics of nothing that are learned."""
    for mode in ("local", "sync", "swap", "regroup"):
        layer = ShuffleBatchNorm(3, mode=mode, groups=2, device="meta")
        assert layer(torch.randn(8, 3, 5, device="meta")).shape == (8, 3, 5)
        layer, plain = ShuffleBatchNorm(3, mode=mode, groups=2), nn.BatchNorm2d(3)
        nothing = torch.empty(8, 3, 0, 5)
        assert layer(nothing).shape == plain(nothing).shape
        for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs)


LAYOUTS = {"local": torch.contiguous_format, "sync": torch.channels_last}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sample", [0, 1])  # the CPU kernels look at the first one before
@pytest.mark.parametrize("mode", ["local", "sync"])
def test_infinity_makes_the_mean_that_batch_norm_has(
    bad: float, compiled: bool, sample: int, mode: str
) -> None:
    """Catches a correction of an infinite mean, which is not a number."""
    torch._dynamo.reset()
    warnings.simplefilter("ignore", DeprecationWarning)  # dynamo's, of its own autograd.Function
    groups = 1 if mode == "local" else 2
    layer, plain = ShuffleBatchNorm(3, mode=mode, groups=groups), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=LAYOUTS[mode])
    x[sample, 0, 2, 2] = bad
    plain(x)
    (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, equal_nan=True)
    torch.testing.assert_close(layer.running_var, plain.running_var, equal_nan=True)


@pytest.mark.parametrize("value", [0.1, 100.1, 10_000.1])
def test_constant_channels_stay_what_they_are(value: float) -> None:
    """Catches a mean whose rounding is the same in all planes, and a variance of such errors."""
    x = torch.full((16, 3, 32, 32), value)
    for kernels in (select(x), reference):
        mean, std = kernels.block_moments(x, (8, 8))
        assert torch.equal(mean, x[:2, :, 0, 0])
        assert std.max() <= 0.1 * torch.finfo(x.dtype).eps * value


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_pooled_rows_are_rounded_once(mean: float) -> None:
    """Catches means that are added up in float32, and Chan's formula without the count."""
    count = torch.randint(1, 9, (2, 64, 1)).double()
    means, stds = _randn(2, 64, 5) + mean, _randn(2, 64, 5).abs()
    rows = torch.cat([count, means, stds], dim=2).float()
    count, means, stds = rows.double().split((1, 5, 5), dim=2)
    share = count / count.sum(dim=1, keepdim=True)
    pooled = (share * means).sum(dim=1, keepdim=True)
    variance = (share * (stds.square() + (means - pooled).square())).sum(dim=1, keepdim=True)
    exact = torch.cat([count.sum(dim=1, keepdim=True), pooled, variance.sqrt()], dim=2)
    assert torch.equal(merge_moments(rows), exact.float())
