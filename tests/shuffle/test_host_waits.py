"""No shuffle waits for the GPU after the first of its kind: its routes go up without waiting."""

from unittest import mock

import pytest
import torch
from torch import nn

from cuda_sync import never_waits
from imaginary_gpu import GPUS, gpu
from shuffle_batchnorm import ShuffleBatchNorm, ShuffledEncoder, batch_shuffle, batch_unshuffle

# Of samples: divisible by the ranks, so that as many go to each, or not.
SIZES = pytest.mark.parametrize("n", [12, 11])


@GPUS
@SIZES
def test_shuffle_and_unshuffle(n: int, ranks: int) -> None:
    """Catches a route that is read on the GPU, or sent up from pageable memory."""
    with gpu(ranks) as no_waits:
        images = torch.randn(n, 3, 4, 4, device="cuda", requires_grad=True)
        labels = torch.arange(n, device="cuda")

        def step() -> None:
            (shuffled, moved), plan = batch_shuffle((images, labels))
            features, _ = batch_unshuffle((shuffled.flatten(1) * 2, moved), plan)
            again, _ = batch_shuffle(images, plan=plan)
            (features.sum() + again.sum()).backward()

        step()
        with no_waits():
            step()


@pytest.mark.gpu
def test_a_generator_on_the_gpu() -> None:
    """Catches a number that is drawn on the GPU and read on the host."""
    images, generator = torch.randn(12, 3, device="cuda"), torch.Generator("cuda").manual_seed(3)
    batch_shuffle(images, generator=generator)
    with never_waits():
        batch_shuffle(images, generator=generator)


@GPUS
@SIZES
def test_an_encoder(n: int, ranks: int) -> None:
    """Catches a check of the batch, or of what the encoder returns, that looks at its numbers."""
    with gpu(ranks) as no_waits:
        layer = ShuffleBatchNorm(3, mode="local", groups=n if n == 11 else 4, device="cuda")
        encoder = ShuffledEncoder(nn.Sequential(layer, nn.Flatten()))
        images = torch.randn(n, 3, 4, 4, device="cuda", requires_grad=True)
        encoder(images).sum().backward()
        with no_waits():
            encoder(images).sum().backward()


def test_no_permutation_is_frozen_in_a_cuda_graph() -> None:
    """Catches a replay that reads where the route was, in pinned memory that others have now."""
    with gpu(1):
        images = torch.randn(12, 3, device="cuda")
        _, plan = batch_shuffle(images)
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            with pytest.raises(RuntimeError, match="another permutation at every replay"):
                batch_shuffle(images)
            batch_unshuffle(batch_shuffle(images, plan=plan)[0], plan)
