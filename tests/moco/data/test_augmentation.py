"""Views: per sample, normalised, and random in a way that can be repeated."""

import pytest
import torch
from torch import Tensor

from cuda_sync import never_waits
from shuffle_batchnorm.moco.data.augmentation import make_augmentation, step_random_state

_STATISTICS = {1: ((0.3,), (0.4,)), 3: ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}


def _view(dataset: str, images: Tensor, policy: str = "standard") -> Tensor:
    channels, side = images.shape[1:3]
    view: Tensor = make_augmentation(dataset, side, policy, *_STATISTICS[channels])(images)
    return view


def _images(n: int, channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, channels, side, side), generator=generator).to(torch.uint8)


def test_none_only_normalises() -> None:
    images = _images(4, 3, 8)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in _STATISTICS[3])
    torch.testing.assert_close(_view("cifar10", images, "none"), (images / 255 - mean) / std)


@pytest.mark.parametrize(
    ("dataset", "channels", "side"),
    [
        ("digits", 1, 16),
        ("fashion-mnist", 1, 28),
        ("cifar10", 3, 32),
        ("cifar100", 3, 32),
        ("imagefolder", 3, 64),
    ],
)
def test_every_sample_has_its_own_numbers(dataset: str, channels: int, side: int) -> None:
    """Catches one transformation for the whole batch, and policies that break on some input."""
    images = _images(1, channels, side).expand(6, -1, -1, -1)
    views = _view(dataset, images)
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert views.isfinite().all()
    assert len(views.flatten(1).unique(dim=0)) == 6


def test_digits_are_not_mirrored() -> None:
    """A mirrored 2 looks like a 5: a bar on the left stays on the left."""
    images = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    images[..., 2:5] = 255
    views = _view("digits", images)
    left, right = views[..., :8].mean((1, 2, 3)), views[..., 8:].mean((1, 2, 3))
    assert (left > right).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floating_images_keep_their_type(dtype: torch.dtype) -> None:
    images = _images(4, 1, 16)
    with step_random_state(0, 0, 0, 0, 0):
        expected = _view("digits", images)
    with step_random_state(0, 0, 0, 0, 0):
        view = _view("digits", images.to(dtype) / 255)
    assert view.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(view, expected)


def test_random_state_follows_from_the_step_alone() -> None:
    images, seen = _images(4, 1, 16), []
    key = (1, 2, 3, 4, 5)
    others = [tuple(v + (i == changed) for i, v in enumerate(key)) for changed in range(5)]
    for seed, epoch, step, rank, view in (key, *others, (1, 2, 34, 5, 0), (1, 23, 4, 5, 0), key):
        torch.rand(3)
        with step_random_state(seed, epoch, step, rank, view):
            seen.append(_view("digits", images))
    torch.testing.assert_close(seen[0], seen[-1], rtol=0, atol=0)
    assert len(torch.stack(seen[:-1]).flatten(1).unique(dim=0)) == len(seen) - 1


def test_random_state_outside_is_untouched() -> None:
    before = torch.get_rng_state()
    with step_random_state(0, 0, 0, 0, 0):
        _view("digits", _images(4, 1, 16))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError), step_random_state(0, 0, 0, 0, 0):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dataset", ["digits", "fashion-mnist", "cifar10", "imagefolder"])
def test_views_on_a_gpu_are_those_on_the_cpu(dataset: str) -> None:
    """Catches random numbers that a GPU draws itself, and a wait for it."""
    pytest.importorskip("kornia")  # make gpu-check does without the extra `train`
    images = _images(8, 1 if dataset in ("digits", "fashion-mnist") else 3, 64)
    augmentation = make_augmentation(dataset, 64, "standard", *_STATISTICS[images.shape[1]])
    with step_random_state(0, 0, 0, 0, 0):
        expected = augmentation(images)
    images, augmentation = images.cuda(), augmentation.cuda()
    before = torch.cuda.get_rng_state()
    for _ in range(2):  # the first one loads its kernels
        with step_random_state(0, 0, 0, 0, 0), never_waits():
            views = augmentation(images)
    torch.testing.assert_close(views.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.cuda.get_rng_state(), before)
