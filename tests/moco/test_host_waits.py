"""No training step waits for the GPU: not MoCo, nor the augmentation, nor the trainer's loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from imaginary_gpu import GPUS, ONE_GPU, RANKS, NeverWaits, gpu
from shuffle_batchnorm.moco import journal
from shuffle_batchnorm.moco.build import normalise_key, normalise_query
from shuffle_batchnorm.moco.config import Dataset, Norm, NormConfig
from shuffle_batchnorm.moco.data.images import ArrayImages, Images
from shuffle_batchnorm.moco.data.loading import make_loader
from shuffle_batchnorm.moco.model import MoCo
from shuffle_batchnorm.moco.ranks.launch import Rank
from shuffle_batchnorm.moco.trainer import Trainer

from .moco_runs import small_config


def _encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5))


BN = pytest.mark.parametrize("bn", ["local", "sync", "regroup", "batch-shuffle"])


@GPUS
@BN
def test_moco(bn: Norm, ranks: int) -> None:
    """Catches a pointer of the queue, or a similarity, that the host reads."""
    _check(bn, ranks)


@RANKS
@BN
@pytest.mark.parametrize(
    "options", [{"symmetric": True, "buffers": "momentum"}, {"buffers": "copy"}], ids=str
)
def test_any_moco(bn: Norm, options: dict[str, Any], ranks: int) -> None:
    """Catches the same in the second pass, and in what follows the query encoder's buffers."""
    _check(bn, ranks, **options)


def _check(bn: Norm, ranks: int, **options: Any) -> None:
    with gpu(ranks) as never_waits:
        norm = NormConfig(bn=bn, groups=4)
        encoders = normalise_query(_encoder(), norm), normalise_key(_encoder(), norm)
        moco = MoCo(*encoders, queue=120, dim=5, **options).to("cuda")
        optimizer = torch.optim.SGD(moco.encoder_q.parameters(), 0.1, 0.9)
        images: Tensor = torch.randn(2, 12, 1, 4, 4, device="cuda")

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=ranks == 0):
                loss = moco(*images).loss
            loss.backward()
            optimizer.step()

        step()
        with never_waits():
            step()


def _trainer(dataset: Dataset, folder: Path, **options: Any) -> Trainer:
    config = small_config(folder, log_every=1000, image_size=32, **options)
    config = replace(config, data=replace(config.data, dataset=dataset))
    channels = 1 if dataset == "digits" else 3
    pixels = torch.zeros(256, channels, 32, 32, dtype=torch.uint8)
    part = ArrayImages(pixels, torch.zeros(256, dtype=torch.int64))
    images = Images(part, part, 10, channels, 32, (0.5,) * channels, (0.2,) * channels)
    with mock.patch.object(journal, "Journal"):
        trainer = Trainer(Rank(0, 1, torch.device("cuda", 0)), config, images, None)
    batch = pixels[:128].pin_memory(), part.labels[:128]
    trainer.loader = [batch, batch]  # type: ignore[assignment]
    return trainer


def _train_two_epochs(trainer: Trainer, never_waits: NeverWaits) -> None:
    with mock.patch.object(trainer, "progress"):  # which waits once, at the end
        trainer.train_epoch(0)
        trainer.step_in_epoch = 0
        with never_waits():
            trainer.train_epoch(1)
    assert trainer.step == 4


@ONE_GPU
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagefolder"])
def test_an_epoch_of_the_trainer(dataset: Dataset, ranks: int, tmp_path: Path) -> None:
    """Catches a loss or an accuracy read at a step, and random numbers that are sent up, waiting.

    kornia sends the few factors of colours and blur that it reads on the host itself.
    """
    pytest.importorskip("kornia")  # make gpu-check does without the extra `train`
    with gpu(ranks, small_copies=dataset != "digits") as never_waits:
        trainer = _trainer(dataset, tmp_path)
        _train_two_epochs(trainer, never_waits)


@ONE_GPU
def test_an_epoch_without_augmentation(ranks: int, tmp_path: Path) -> None:
    """The same with neither kornia nor numbers of its own, on channels_last images."""
    with gpu(ranks) as never_waits:
        precision = "bf16" if ranks == 0 else "float64"
        options = {"augment": "none", "precision": precision, "channels_last": True}
        trainer = _trainer("digits", tmp_path, **options)
        _train_two_epochs(trainer, never_waits)


@pytest.mark.parametrize("there_is", [False, True])
def test_loaded_images_are_in_pinned_memory_where_there_is_a_gpu(there_is: bool) -> None:
    """Catches a loader whose batches go up by a copy that waits."""
    images = ArrayImages(torch.zeros(4), torch.zeros(4))
    with mock.patch("torch.cuda.is_available", return_value=there_is):
        assert make_loader(images, [[0]]).pin_memory == there_is
