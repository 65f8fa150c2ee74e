"""Which images are encoded together, and what counts as a hit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from probe.known_leaks import one_thread
from shuffle_batchnorm import measure_leak
from shuffle_batchnorm.probe.batches import default_keys

__all__ = ["one_thread"]  # a fixture

SMALL: dict[str, Any] = dict(batch_size=16, batches=16, keys_per_batch=8, keys_per_pass=8)


def _identity(x: Tensor) -> Tensor:
    return x


def test_a_constant_encoder_scores_nothing() -> None:
    """A tie is no hit, also if the dot products round differently."""

    def constant(x: Tensor) -> Tensor:
        return torch.linspace(0.1, 0.9, 100).expand(len(x), 100)

    queue = torch.linspace(0.1, 0.9, 100).expand(37, 100)
    for negatives in (queue, None):
        report = measure_leak(constant, constant, torch.randn(40, 2), None, negatives, **SMALL)
        assert (report.as_trained, report.fresh) == (0, 0)


def test_keys_are_encoded_at_their_positions_in_the_same_augmentation() -> None:
    """And nothing else of the batch is left, or one of the images of the batch comes back."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []

    def record(seen: list[Tensor]) -> Any:
        def encode(x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x.mul_(2)  # in place, as some encoders work

        return encode

    def augment(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], torch.rand(len(x))], dim=1)

    images = torch.stack([torch.arange(60.0), torch.zeros(60)], dim=1)
    sizes: dict[str, Any] = dict(batch_size=16, batches=2, keys_per_batch=8, keys_per_pass=2)
    measure_leak(record(queries), record(keys), images, augment, torch.ones(3, 2), **sizes)
    assert (images[:, 0] == torch.arange(60)).all()
    assert (len(queries), len(keys)) == (2, 2 * (1 + 4))
    assert not (queries[0][:, 0] == queries[1][:, 0]).all()
    for batch, query in enumerate(queries):
        trained, *passes = keys[5 * batch : 5 * batch + 5]
        assert (query[:, 0] == trained[:, 0]).all()
        assert not (query[:, 1] == trained[:, 1]).any()
        positions = set()
        for fresh in passes:
            assert len(fresh.unique(dim=0)) == 16
            same = (fresh == trained).all(dim=1)
            among = torch.isin(fresh[:, 0], trained[:, 0])
            assert (same == among).all()
            first, second = same.nonzero().flatten().tolist()
            assert second - first == 8  # as far apart as can be
            positions |= {first, second}
        assert len(positions) == 8


@pytest.mark.parametrize(("batch", "keys", "per_pass"), [(16, 16, 1), (16, 15, 15), (13, 12, 4)])
def test_sizes_that_fit_barely(batch: int, keys: int, per_pass: int) -> None:
    """Every image is needed, and positions that are not evenly spaced exist."""
    sizes: dict[str, Any] = dict(
        batch_size=batch, keys_per_batch=keys, keys_per_pass=per_pass, batches=2
    )
    images = torch.randn(2 * batch - per_pass, 6)
    report = measure_leak(_identity, _identity, images, None, torch.randn(5, 6), **sizes)
    assert report.keys == 2 * keys


@pytest.mark.parametrize(
    ("batch", "per_pass", "keys"),
    [(256, 1, 16), (256, 8, 128), (256, 32, 256), (8, 1, 8), (24, 5, 20), (2, 8, 8), (8, 0, 16)],
)
def test_default_keys_fit_the_batch_and_the_passes(batch: int, per_pass: int, keys: int) -> None:
    """Catches a default that is refused; where none fits, `check_sizes` says why."""
    assert default_keys(batch, per_pass) == keys
