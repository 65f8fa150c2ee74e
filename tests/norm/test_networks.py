"""Whole networks: regroup is MoCo's Shuffling BN, and depth is stable where theory says so."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, mixing_matrix, record_statistics, spectral_radius
from truth import gradient


def _encoder() -> nn.Module:
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for width_in, width_out in ((3, 6), (6, 6), (6, 5)):
        layers += [nn.Conv2d(width_in, width_out, 3, padding=1), nn.BatchNorm2d(width_out)]
        layers += [nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(5 * 4 * 4, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)]
    return nn.Sequential(*layers, *head).double()


def _images(groups: int, each: int) -> Tensor:
    x = torch.randn(groups * each, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return (x * torch.linspace(0.5, 3, len(x)).view(-1, 1, 1, 1)).double()


def _new_groups(total: int, each: int, offset: int, blocks: int) -> list[list[int]]:
    """The samples of each new group: the permutation, spelt out."""
    pieces = min(total, blocks)
    new: list[list[int]] = [[] for _ in range(total)]
    for i in range(total):
        for c, part in enumerate(
            torch.tensor_split(torch.arange(i * each, (i + 1) * each), pieces)
        ):
            new[(i + offset * c) % total] += part.tolist()
    return new


def _moco(total: int, each: int, offset: int, blocks: int) -> list[Tensor]:
    """Permute the samples into the new groups, plain BN in each group, permute back."""
    encoder, x = _encoder(), _images(total, each).requires_grad_()
    rows = _new_groups(total, each, offset, blocks)
    out = torch.cat([encoder(x[group]) for group in rows])
    out = out[torch.tensor([s for group in rows for s in group]).argsort()]
    _loss(out).backward()
    return [out.detach(), gradient(x), *(gradient(p) for p in encoder.parameters())]


def _loss(out: Tensor) -> Tensor:
    return (out.pow(3) + out).sum()


def _regrouped(world_size: int, groups: int, each: int, offset: int, blocks: int) -> list[Tensor]:
    rank = dist.get_rank()
    encoder = ShuffleBatchNorm.convert_shuffle_batchnorm(
        _encoder(), mode="regroup", groups=groups, offset=offset, blocks=blocks
    )
    x = _images(world_size * groups, each).chunk(world_size)[rank].requires_grad_()
    out = encoder(x)
    _loss(out).backward()
    return [out.detach(), gradient(x), *(gradient(p) for p in encoder.parameters())]


@pytest.mark.parametrize(
    ("world_size", "groups", "each", "offset", "blocks"),
    [(1, 4, 8, 1, 8), (1, 8, 5, 3, 4), (2, 2, 8, 1, 8), (3, 1, 7, 2, 8), (4, 2, 4, 3, 3)],
)
def test_regroup_is_shuffling_bn(
    world_size: int, groups: int, each: int, offset: int, blocks: int
) -> None:
    """Catches a regrouping that is not a permutation, in any layer, forward or backward."""
    results = run_on_ranks(world_size, _regrouped, world_size, groups, each, offset, blocks)
    out, grad_x, *grads = _moco(world_size * groups, each, offset, blocks)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), grad_x, rtol=1e-9, atol=1e-10)
    for k, want in enumerate(grads):
        total = torch.stack([r[2 + k] for r in results]).sum(dim=0)
        torch.testing.assert_close(total, want, rtol=1e-9, atol=1e-10)


class _Residual(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.body = _plain(layers, width)[:-1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def _plain(layers: int, width: int = 8) -> nn.Sequential:
    net: list[nn.Module] = []
    for _ in range(layers):
        net += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*net)


NETS = {
    "plain 50": lambda: _plain(50),
    "residual 49": lambda: nn.Sequential(_plain(1), *[_Residual(8, 2) for _ in range(24)]),
}


def _largest(net: nn.Module, mode: str) -> float:
    """The largest activation of a network with random weights, 8 groups of 8."""
    with torch.no_grad():
        if mode == "swap":
            with pytest.warns(UserWarning, match="activations can double"):
                net = _converted(net, mode)
        else:
            net = _converted(net, mode)
        x = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(4)).double()
        return float(net(x).abs().max())


def _converted(net: nn.Module, mode: str) -> nn.Module:
    return ShuffleBatchNorm.convert_shuffle_batchnorm(copy.deepcopy(net), mode=mode, groups=8)


@pytest.mark.parametrize("name", NETS)
def test_depth_is_stable_in_partitions_and_not_in_swap(name: str) -> None:
    """Catches a mode whose activations grow with depth (ShuffleBN#2: the loss goes to NaN)."""
    torch.manual_seed(5)
    net = NETS[name]().double()
    local = _largest(net, "local")
    for mode in ("sync", "regroup"):
        assert _largest(net, mode) < 3 * local
    assert _largest(net, "swap") > 1e3 * local


def _deviations(net: nn.Module, x: Tensor, groups: int) -> Tensor:
    """Per layer, the norm over groups of their log-scale against their normaliser."""
    with torch.no_grad(), record_statistics(net) as records:
        net(x)
    rows = [(r.own_var.log() - r.used_var.log()).mean(dim=1) / 2 for r in records]
    return torch.stack([row.view(groups, -1)[:, 0].norm() for row in rows])


@pytest.mark.parametrize("groups", [2, 3, 5, 8])
@pytest.mark.parametrize("mode", ["swap", "regroup"])
def test_scales_evolve_as_the_matrix_says(mode: str, groups: int) -> None:
    """Catches a matrix, or a layer, with another rotation: scales follow I - M exactly."""
    n, depth = 2 * groups, 6
    net = nn.Sequential(
        *[
            ShuffleBatchNorm(
                1, eps=1e-30, mode=mode, groups=groups, affine=False, dtype=torch.float64
            )
            for _ in range(depth)
        ]
    )
    matrix = mixing_matrix(mode, world_size=1, groups=groups, batch_size=groups * n)
    # Groups alike but for tiny differences of scale, so that the log-scales evolve linearly.
    scales = 1e-6 * torch.randn(groups, 1, dtype=torch.float64)
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(groups, n // 2) * (1 + scales)
    out, rho = x.view(-1, 1), scales.expand(-1, n).reshape(-1)
    for layer in net:
        out = layer(out)
        rho = rho - matrix @ rho
        torch.testing.assert_close(out.abs().log()[:, 0], rho, rtol=1e-3, atol=1e-9)


def test_growth_of_swap_follows_its_spectral_radius() -> None:
    """Catches a theory that holds for toy layers only: a CNN's first layers, before saturation."""
    groups, growth = 8, []
    radius = spectral_radius(mixing_matrix("swap", world_size=1, groups=groups, batch_size=64))
    for seed in range(9):
        torch.manual_seed(seed)
        net = _converted(_plain(7).double(), "swap")
        norms = _deviations(net, torch.randn(64, 8, 8, 8, dtype=torch.float64), groups)
        growth.append(float((norms[6] / norms[1]) ** (1 / 5)))
    assert sorted(growth)[4] == pytest.approx(radius, rel=0.2)
    net = _converted(_plain(7).double(), "regroup")
    norms = _deviations(net, torch.randn(64, 8, 8, 8, dtype=torch.float64), groups)
    assert norms[6] < 2 * norms[1]
