"""Stability: the spectral radius in closed form, and activations against mode `local`."""

import itertools
from typing import Any, Self

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from probe.known_leaks import convolutional, one_thread
from ranks import outcomes_on_ranks, run_on_ranks
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    StabilityReport,
    mixing_matrix,
    spectral_radius,
    stability,
)
from shuffle_batchnorm.norm.mixing import Options
from shuffle_batchnorm.probe.stability import _radius

__all__ = ["one_thread"]  # a fixture


@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
def test_the_closed_form_is_the_radius_of_the_mixing_matrix(mode: str) -> None:
    sizes = itertools.product((1, 2, 3), (1, 2, 3, 4), (1, 2, 5), (0, 1, 2, 3, -1))
    for world_size, groups, samples, offset in sizes:
        cut = dict(groups=groups, offset=offset, blocks=3)
        n = groups * samples
        matrix = mixing_matrix(mode, world_size=world_size, batch_size=n, **cut)
        expected = spectral_radius(matrix)
        found = _radius(Options(mode, **cut), world_size, samples)
        assert found == pytest.approx(expected, abs=1e-6), (world_size, samples, cut)


def _plain(depth: int, mode: str, groups: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        convolution = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        layers += [convolution, ShuffleBatchNorm(8, mode=mode, groups=groups), nn.ReLU()]
    return nn.Sequential(*layers).double()


def _images(n: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 8, 4, 4, generator=generator, dtype=torch.float64)


def test_swap_grows_with_depth_and_partitions_do_not() -> None:
    swap, regroup = (stability(_plain(14, mode), _images()) for mode in ("swap", "regroup"))
    assert swap.spectral_radius == pytest.approx(2)
    assert swap.ratio[-1] > 100 > 2 > swap.ratio[0]
    assert regroup.spectral_radius == 1
    assert all(0.8 < ratio < 1.25 for ratio in regroup.ratio)
    assert regroup.layers == tuple(str(3 * k + 1) for k in range(14))
    assert "spectral radius 2.00; scale against local over 14 layers: " in str(swap)


def test_scales_are_root_mean_squares_and_their_ratio() -> None:
    """By hand, for two groups of two samples; the second layer puts out zeros."""
    layers = [ShuffleBatchNorm(1, eps=1e-30, groups=2), ShuffleBatchNorm(1, groups=2)]
    layers[1].weight.data.zero_()
    x = torch.tensor([[0.0], [2.0], [3.0], [7.0]])
    report = stability(nn.Sequential(*layers).eval(), x)  # it runs in training mode all the same
    # Group 1 has mean 1 and deviation 1, group 2 mean 5 and deviation 2.
    rms = ((2.5**2 + 1.5**2 + 2**2 + 6**2) / 4) ** 0.5
    expected = ((rms, 0.0), (1.0, 0.0), (rms, 1.0))
    found = (report.scale, report.local_scale, report.ratio)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other)


def test_the_second_run_is_local_in_every_layer() -> None:
    modes: list[tuple[str, int]] = []
    model = nn.Sequential(*(ShuffleBatchNorm(2, mode=mode) for mode in ("sync", "swap")))
    for layer in model:
        layer.register_forward_pre_hook(lambda layer, _: modes.append((layer.mode, layer.offset)))
    stability(model, torch.randn(4, 2))
    assert modes == [("sync", 1), ("swap", 1), ("local", 1), ("local", 1)]


def test_a_layer_that_stays_in_eval_mode_is_compared_with_plain_batch_norm() -> None:
    """Catches two runs that are the same; EMAN's key encoder has such layers."""

    class Frozen(ShuffleBatchNorm):
        def train(self, mode: bool = True) -> Self:  # noqa: ARG002
            return super().train(False)

    layer = Frozen(1, eps=1e-30, mode="local", groups=2).train()
    x = torch.tensor([[-3.0], [3.0], [6.0], [-6.0]])
    report = stability(layer, x)
    assert report.scale == pytest.approx([22.5**0.5])  # its running statistics are 0 and 1
    assert report.local_scale == pytest.approx([1])
    assert not layer.training


def test_a_layer_used_twice_counts_twice_and_an_unused_one_not() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used = ShuffleBatchNorm(2), ShuffleBatchNorm(2, mode="regroup")

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.used(scale * self.used(x))  # type: ignore[no-any-return]

    report = stability(Odd(), (torch.randn(8, 2), 3.0))
    assert report.layers == ("used",)
    assert report.ratio == (1,)


def test_dropout_is_the_same_in_both_runs() -> None:
    model = nn.Sequential(nn.Dropout(0.5), ShuffleBatchNorm(8, mode="local", groups=4)).eval()
    assert stability(model, torch.randn(64, 8)).ratio == (1,)


def test_wrapped_and_compiled_models() -> None:
    model = convolutional("regroup", groups=4)
    images = torch.randn(16, 3, 6, 6)
    plain = stability(model, images)
    assert stability(torch.compile(model, backend="eager"), images).ratio == plain.ratio
    shuffled = stability(ShuffledEncoder(convolutional("local", groups=4)), images)
    assert list(shuffled.ratio) == [1] * 4
    bare = stability(ShuffledEncoder(ShuffleBatchNorm(3, mode="local", groups=4)), images)
    assert list(bare.ratio) == [1]


def test_errors_name_the_call() -> None:
    with pytest.raises(TypeError, match="stability: model must be a module, got function"):
        stability(lambda x: x, _images())
    with pytest.raises(ValueError, match="stability: Linear has no ShuffleBatchNorm layer; conv"):
        stability(nn.Linear(1, 1), _images())
    holder = ShuffledEncoder(nn.Identity())
    holder.layer = ShuffleBatchNorm(2)
    with (
        pytest.warns(UserWarning, match="does nothing"),
        pytest.raises(ValueError, match="ShuffledEncoder calls none of its ShuffleBatchNorm"),
    ):
        stability(holder, torch.randn(4, 2))


def _on_ranks(mode: str, groups: int) -> StabilityReport:
    n = 48 // dist.get_world_size()
    images = _images(48)[dist.get_rank() * n :][:n]
    model = DistributedDataParallel(_plain(6, mode, groups))
    return stability(model, images)


@pytest.mark.parametrize("mode", ["swap", "regroup", "sync"])
def test_ranks_agree_with_one_process(mode: str) -> None:
    """The scale is that of all ranks' samples, and the radius that of all ranks' groups."""
    expected = stability(_plain(6, mode, groups=6), _images(48))
    for world_size in (2, 3):
        for report in run_on_ranks(world_size, _on_ranks, mode, 6 // world_size):
            assert report.layers[0] == "module.1"
            assert report.scale == pytest.approx(expected.scale, rel=1e-9)
            assert report.ratio == pytest.approx(expected.ratio, rel=1e-9)
            assert report.spectral_radius == expected.spectral_radius


class _Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise OverflowError("too large")
        return x


def _bad(kind: str) -> Any:
    layers: list[nn.Module] = [ShuffleBatchNorm(8, mode="regroup")]
    if kind == "failing":
        layers.insert(0, _Failing())
    elif dist.get_rank() == 1:
        layers = [nn.ReLU()] if kind == "none" else layers * 1 + [ShuffleBatchNorm(8)]
    return stability(nn.Sequential(*layers), _images(4))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "rank 1 rejected its input: stability: Sequential has no ShuffleBatchNorm layer"),
        ("other", "ranks disagree on the number of layers: 1 on rank 0, 2 on rank 1"),
        ("failing", "too large"),
    ],
)
def test_one_rank_that_differs_ends_all(kind: str, message: str) -> None:
    outcomes = outcomes_on_ranks(2, _bad, kind)
    assert message in str(outcomes[0])
    assert all(isinstance(outcome, Exception) for outcome in outcomes)


def test_the_default_device_does_not_matter() -> None:
    """Catches a report made where it can't be read."""
    model, x = nn.Sequential(ShuffleBatchNorm(3, groups=2)), torch.randn(4, 3)
    want = stability(model, x)
    with torch.device("meta"):
        got = stability(model, x)
    assert (got.spectral_radius, str(got)) == (want.spectral_radius, str(want))
