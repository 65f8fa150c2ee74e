"""The leak by layer: parts that sum to it, and that lie where it was planted."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from probe.known_leaks import Signature, convolutional, deep_pairs, one_thread, pool_of_ids
from ranks import run_on_ranks
from shuffle_batchnorm import LeakReport, ShuffleBatchNorm, ShuffledEncoder, measure_leak
from shuffle_batchnorm.probe.shapley import EXACT

__all__ = ["one_thread"]  # a fixture

SIZES: dict[str, Any] = dict(batch_size=24, batches=8, keys_per_batch=6, keys_per_pass=6)


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(60, 3, 6, 6, generator=generator, dtype=torch.float64)


class _Pair(nn.Module):
    """Two encoders whose methods are the callables, as MoCo's are."""

    def __init__(self, query: nn.Module, key: nn.Module) -> None:
        super().__init__()
        self.query, self.key = query.double(), key.double()

    def encode_query(self, x: Tensor) -> Tensor:
        return F.normalize(self.query(x))

    def encode_key(self, x: Tensor) -> Tensor:
        return F.normalize(self.key(x))


def _report(pair: _Pair, *, queue: bool = True, by_layer: bool = True, **sizes: Any) -> LeakReport:
    with torch.no_grad():
        negatives = F.normalize(convolutional("local", 1).double()(_images()))
    options = {**SIZES, **sizes}
    callables = pair.encode_query, pair.encode_key
    return measure_leak(
        *callables, _images(), None, negatives if queue else None, by_layer=by_layer, **options
    )


@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize("per_pass", [3, 6])
def test_parts_sum_to_the_leak(queue: bool, per_pass: int) -> None:
    """And the rest of the report is what it is without them."""
    pair = _Pair(convolutional("local", 6), convolutional("local", 6))
    report = _report(pair, queue=queue, keys_per_pass=per_pass)
    plain = _report(pair, queue=queue, keys_per_pass=per_pass, by_layer=False)
    assert list(report.by_layer) == ["key.1", "key.4", "key.7", "key.10"]
    assert report.leak > 0.1
    assert sum(report.by_layer.values()) == pytest.approx(report.leak, abs=1e-9)
    for name, (low, high) in report.layer_intervals.items():
        assert low < report.by_layer[name] < high
    assert (plain.leak, plain.interval) == (report.leak, report.interval)
    assert (plain.by_layer, plain.layer_intervals, plain.shares) == ({}, {}, {})


@pytest.mark.parametrize("place", [1, 4, 7])
def test_all_of_it_is_in_the_one_layer_that_mixes(place: int) -> None:
    layers = [
        nn.Identity() if isinstance(layer, (nn.ReLU, ShuffleBatchNorm)) and k != place else layer
        for k, layer in enumerate(deep_pairs(16, depth=3, groups=12).children())
    ]
    encoder = nn.Sequential(*layers)
    images, queue = torch.randn(200, 16).double(), torch.randn(64, 16).double().sign()
    report = measure_leak(encoder, encoder, images, None, queue, by_layer=True, **SIZES)
    assert report.leak > 0.5
    assert report.by_layer == {f"{place}": pytest.approx(report.leak)}
    assert report.shares == {f"{place}": pytest.approx(1)}


class _Branches(nn.Module):
    """Two encoders that mix samples alike; what one of them says hardly counts."""

    def __init__(self, strong: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(deep_pairs(16, depth=1, groups=12) for _ in range(2))
        self.strong = strong

    def forward(self, x: Tensor) -> Tensor:
        first, second = (branch(x) for branch in self.branches)
        weights = (1.0, 1e-9) if self.strong == 0 else (1e-9, 1.0)
        mixed: Tensor = weights[0] * first + weights[1] * second
        return mixed


@pytest.mark.parametrize("strong", [0, 1])
def test_each_layer_gets_its_own_part(strong: int) -> None:
    """Catches coalitions of the right size with the wrong layers in them."""
    encoder = _Branches(strong)
    images, queue = torch.randn(200, 16).double(), torch.randn(64, 16).double().sign()
    report = measure_leak(encoder, encoder, images, None, queue, by_layer=True, **SIZES)
    assert report.leak > 0.3
    assert len(report.by_layer) == 2
    parts = list(report.by_layer.values())
    assert parts[strong] == pytest.approx(report.leak)
    assert parts[1 - strong] == pytest.approx(0, abs=1e-9)


def test_many_layers_are_sampled_anew_in_each_batch() -> None:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(108, 16)]
    for _ in range(EXACT + 1):
        norm = ShuffleBatchNorm(16, mode="local", groups=6)
        layers += [nn.Linear(16, 16), norm, nn.ReLU()]
    key = nn.Sequential(*layers, nn.Linear(16, 32))
    report = _report(_Pair(key, key), keys_per_batch=6)
    assert len(report.by_layer) == EXACT + 1
    assert sum(report.by_layer.values()) == pytest.approx(report.leak, abs=1e-9)


def test_a_shuffled_encoder_is_one_layer() -> None:
    """Its permutation is another one in each pass of the probe, and the same in patched ones."""
    report = _report(_Pair(convolutional("local", 6), ShuffledEncoder(convolutional("local", 6))))
    assert report.by_layer == {"key": pytest.approx(report.leak)}


def test_keys_that_do_not_depend_on_their_batch_have_no_layers() -> None:
    key = nn.Sequential(nn.Flatten(), nn.Linear(108, 32), nn.LayerNorm(32))
    report = _report(_Pair(key, key))
    assert (report.leak, report.by_layer, report.shares) == (0, {}, {})


def test_what_mixes_outside_of_modules_is_refused() -> None:
    """Catches parts that are made up: nothing is patched, so nothing can be told."""
    encoder = Signature(1.0)
    calls = encoder.query, encoder.key, pool_of_ids(64), None, encoder.queue
    sizes: dict[str, Any] = dict(batch_size=16, batches=8, keys_per_batch=4)
    with pytest.raises(RuntimeError, match=r"don't reproduce the fresh batch \(off by 1 of"):
        measure_leak(*calls, by_layer=True, **sizes)
    norm = nn.BatchNorm1d(4).double()

    def mixed(x: Tensor) -> Tensor:
        y: Tensor = norm(encoder.key(x))
        return y

    with pytest.raises(RuntimeError, match="measure_leak: with by_layer=True keys must depend on"):
        measure_leak(encoder.query, mixed, *calls[2:], by_layer=True, **sizes)


def _on_ranks(mode: str) -> LeakReport:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    query = "sync" if mode == "sync" else "local"
    pair = _Pair(convolutional(query, 6 // ranks), convolutional(mode, 6 // ranks))
    return _report(pair, keys_per_batch=1, keys_per_pass=1)


@pytest.mark.parametrize("mode", ["local", "sync"])
def test_ranks_agree_with_one_process(mode: str) -> None:
    """Also where a rank has no key in a pass."""
    expected = _on_ranks(mode)
    for world_size in (2, 3):
        for report in run_on_ranks(world_size, _on_ranks, mode):
            assert report.leak == expected.leak
            assert report.by_layer == pytest.approx(expected.by_layer, abs=1e-9)
