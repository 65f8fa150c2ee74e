"""Two views of an image, on the device where the image is, by kornia."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shuffle_batchnorm.shuffle.permutations import send_up

_BYTE = 255.0
# What kornia reads on the host; it sends these few bytes to the images' device itself.
_ON_HOST = {
    "brightness_factor", "contrast_factor", "saturation_factor", "hue_factor", "order", "sigma",
    "forward_input_shape",
}  # fmt: skip


class Augmentation(nn.Module):
    """Images as they are loaded to what an encoder takes, changed at random on the way.

    Every sample has its own random numbers, from the CPU's random state of the moment (see
    `step_random_state`), the same on every device. They go to a GPU without waiting for it.

    Args:
        policy: kornia's augmentations, one after the other, of images ``[N, c, H, H]`` of values
            from 0 to 1.
        mean: of each channel, of values from 0 to 1.
        std: of each channel.

    Shape:
        ``[N, c, H, H]`` in uint8, or floating from 0 to 1, to the same shape in float32, or in
        the floating dtype given.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, policy: Sequence[Any], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # No submodules, or they would move to the GPU and draw there what kornia reads on the host.
        self.policy = tuple(policy)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Change and normalise. See the class."""
        if not images.is_floating_point():
            images = images.float() / _BYTE
        mean, std = (t.to(images.device, images.dtype) for t in (self.mean, self.std))
        for step in self.policy:
            numbers = {
                name: number if name in _ON_HOST else send_up(number, images.device)
                for name, number in step.forward_parameters(images.shape).items()
            }
            images = step(images, params=numbers)
        return (images - mean) / std


def make_augmentation(
    dataset: str, image_size: int, policy: str, mean: Sequence[float], std: Sequence[float]
) -> Augmentation:
    """Build the augmentation of a data set.

    ``standard`` is MoCo v2's for photographs, with blur for ``imagefolder`` only, and for the grey
    images of ``fashion-mnist`` without what needs colours; ``digits`` are turned, moved and scaled
    a little and get noise, without a flip. ``none`` only normalises, for evaluation.

    Args:
        dataset: ``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100`` or ``imagefolder``.
        image_size: H.
        policy: ``standard`` or ``none``, as `validate` has checked.
        mean: of each channel, of values from 0 to 1.
        std: of each channel.

    Returns:
        An `Augmentation`; it has no parameters.

    Source:
        Chen et al. 2020, arXiv 2003.04297.

    Example:
        >>> view = make_augmentation("digits", 16, "standard", mean=(0.3,), std=(0.35,))
        >>> view(torch.zeros(4, 1, 16, 16, dtype=torch.uint8)).shape
        torch.Size([4, 1, 16, 16])
    """
    if policy == "none":
        return Augmentation((), mean, std)
    # Not at the top: without a policy it isn't needed.
    from kornia import augmentation as kornia

    steps: list[Any]
    if dataset == "digits":
        steps = [
            kornia.RandomAffine(degrees=15.0, translate=(0.1, 0.1), scale=(0.8, 1.2), p=1.0),
            kornia.RandomGaussianNoise(std=0.1, p=1.0),
        ]
    else:
        side, flip = (image_size, image_size), kornia.RandomHorizontalFlip(p=0.5)
        crop = kornia.RandomResizedCrop(side, scale=(0.2, 1.0), cropping_mode="resample")
        if dataset == "fashion-mnist":
            return Augmentation([crop, kornia.ColorJitter(0.4, 0.4, p=0.8), flip], mean, std)
        jitter = kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
        steps = [crop, jitter, kornia.RandomGrayscale(p=0.2), flip]
        if dataset == "imagefolder":
            # A tenth of the image, made odd, as SimCLR has it.
            kernel = image_size // 10 // 2 * 2 + 1
            steps.insert(3, kornia.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5))
    return Augmentation(steps, mean, std)


@contextmanager
def step_random_state(seed: int, epoch: int, step: int, rank: int, view: int) -> Iterator[None]:
    """Give a block random numbers of its own: those of one view in one step on one rank.

    They follow from the arguments alone, so a resumed run draws the same numbers.
    The CPU's random state is afterwards what it was; that of a GPU is not touched.

    Args:
        seed: of the run.
        epoch: counted from 0.
        step: of the epoch.
        rank: of this process.
        view: 0 or 1.

    Example:
        >>> with step_random_state(0, 3, 14, rank=0, view=1):
        ...     first = torch.rand(2)
        >>> with step_random_state(0, 3, 14, rank=0, view=1):
        ...     second = torch.rand(2)
        >>> bool((first == second).all())
        True
    """
    numbers = ",".join(map(str, (seed, epoch, step, rank, view)))
    digest = hashlib.blake2b(numbers.encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs as well. Below 2**63, as all seeds are.
        torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        yield
