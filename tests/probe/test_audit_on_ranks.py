"""The audit over ranks: the same report on all, as in one process; errors end all."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from probe.known_leaks import convolutional, one_thread
from ranks import outcomes_on_ranks, run_on_ranks
from shuffle_batchnorm import AuditReport, audit

__all__ = ["one_thread"]  # a fixture


def _images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)


def _alone(mode: str, ranks: int) -> AuditReport:
    """In one process, with a probe where each rank has its one."""
    probes = [24 // ranks * k for k in range(ranks)]
    model = convolutional(mode, groups=6).double()
    return audit(model, _images(24), probes=probes, replace=_images(25)[24:])


def _on_ranks(mode: str) -> AuditReport:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = DistributedDataParallel(convolutional(mode, groups=6 // ranks).double())
    own = _images(24).chunk(ranks)[rank]
    return audit(model, own, probes=[0], replace=_images(25)[24:])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_ranks_agree_with_one_process(mode: str, ranks: int) -> None:
    """Catches a change that is one rank's own, and others that stay on other ranks."""
    expected = _alone(mode, ranks)
    for report in run_on_ranks(ranks, _on_ranks, mode):
        assert (report.samples, report.probes) == (24, ranks)
        assert report.dependence == pytest.approx(expected.dependence, rel=1e-9)
        assert list(report.shares) == [f"module.{name}" for name in expected.shares]
        wanted = list(expected.shares.values())
        assert list(report.shares.values()) == pytest.approx(wanted, rel=1e-6)


class _Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise OverflowError("too large")
        return x


def _bad(kind: str) -> Any:
    model: nn.Module = convolutional("sync", groups=1).double()
    bad = dist.get_rank() == 1
    if kind == "widths":
        model = nn.Sequential(model, nn.ConstantPad1d((0, int(bad)), 0.0))
    if kind == "failing":
        model = nn.Sequential(_Failing(), model)
    return audit(model, _images(8), probes=[8] if bad and kind == "probes" else None)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("probes", "rank 1 rejected its input: audit: probes must be", "audit: probes must be"),
        ("widths", "ranks disagree on the numbers in", "ranks disagree on the numbers in"),
        ("failing", "rank 1 stopped: audit: too large", "too large"),
    ],
)
def test_one_rank_that_fails_ends_all(kind: str, first: str, second: str) -> None:
    outcomes = outcomes_on_ranks(2, _bad, kind)
    assert first in str(outcomes[0])
    assert second in str(outcomes[1])
