"""Two views of an image, on the device where the image is, by kornia."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_BYTE = 255.0


class Augmentation(nn.Module):
    """Images as they are loaded to what an encoder takes, changed at random on the way.

    Every sample has its own random numbers, from torch's random state of the moment; see
    `step_random_state`.

    Args:
        policy: changes images ``[N, c, H, H]`` of values from 0 to 1.
        mean: of each channel, of values from 0 to 1.
        std: of each channel.

    Shape:
        ``[N, c, H, H]`` in uint8, or floating from 0 to 1, to the same shape in float32, or in
        the floating dtype given.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, policy: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.policy = policy
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Change and normalise. See the class."""
        if not images.is_floating_point():
            images = images.float() / _BYTE
        mean, std = (t.to(images.device, images.dtype) for t in (self.mean, self.std))
        changed: Tensor = self.policy(images)
        return (changed - mean) / std


def make_augmentation(
    dataset: str, image_size: int, policy: str, mean: Sequence[float], std: Sequence[float]
) -> Augmentation:
    """Build the augmentation of a data set.

    ``standard`` is MoCo v2's for photographs, with blur for ``imagefolder`` only; ``digits`` are
    turned, moved and scaled a little and get noise, without a flip. ``none`` only normalises, for
    evaluation.

    Args:
        dataset: ``digits``, ``cifar10``, ``cifar100`` or ``imagefolder``.
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
        return Augmentation(nn.Sequential(), mean, std)
    # Not at the top: without a policy it isn't needed.
    from kornia import augmentation as kornia

    steps: list[nn.Module]
    if dataset == "digits":
        steps = [
            kornia.RandomAffine(degrees=15.0, translate=(0.1, 0.1), scale=(0.8, 1.2), p=1.0),
            kornia.RandomGaussianNoise(std=0.1, p=1.0),
        ]
    else:
        steps = [
            kornia.RandomResizedCrop(
                (image_size, image_size), scale=(0.2, 1.0), cropping_mode="resample"
            ),
            kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            kornia.RandomGrayscale(p=0.2),
            kornia.RandomHorizontalFlip(p=0.5),
        ]
        if dataset == "imagefolder":
            # A tenth of the image, made odd, as SimCLR has it.
            kernel = image_size // 10 // 2 * 2 + 1
            steps.insert(3, kornia.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5))
    return Augmentation(nn.Sequential(*steps), mean, std)


@contextmanager
def step_random_state(
    seed: int, epoch: int, step: int, rank: int, view: int, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Give a block random numbers of its own: those of one view in one step on one rank.

    They follow from the arguments alone, so a resumed run draws the same numbers.
    The random states of the CPU and the device are afterwards what they were.

    Args:
        seed: of the run.
        epoch: counted from 0.
        step: of the epoch.
        rank: of this process.
        view: 0 or 1.
        device: whose random state is seeded besides the CPU's.

    Example:
        >>> with step_random_state(0, 3, 14, rank=0, view=1):
        ...     first = torch.rand(2)
        >>> with step_random_state(0, 3, 14, rank=0, view=1):
        ...     second = torch.rand(2)
        >>> bool((first == second).all())
        True
    """
    device = torch.device(device)
    numbers = ",".join(map(str, (seed, epoch, step, rank, view)))
    digest = hashlib.blake2b(numbers.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1  # below 2**63, which all generators take
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which would seed all the other GPUs as well.
        torch.default_generator.manual_seed(number)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(number)
        yield
