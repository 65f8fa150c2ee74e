"""What a model is worth and whether it cheats: kNN, linear probe, leak and stability.

All ranks call these together; the model is afterwards what it was.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shuffle_batchnorm.norm.contexts import synchronize_running_stats
from shuffle_batchnorm.probe.leak import LeakReport, measure_leak, stability

from .build import Views
from .config import LEAK_BATCHES, LEAK_KEYS, Config, ConfigError
from .data.images import Images
from .data.loading import make_loader, whole_batches
from .evaluation import extract_features, knn_accuracy, linear_probe
from .model import MoCo
from .ranks.control import broadcast_object, gather_objects
from .ranks.launch import Place

EVALUATION_BATCH = 256
CALL = "train"
Features = tuple[Tensor, Tensor]


class Evaluation:
    """kNN and linear probe of a query encoder, by images that every rank encodes a share of.

    Communication: the running statistics are averaged; features go to rank 0, the result back.

    Args:
        config: the run.
        images: its data set.
        views: prepares the images.
        place: this rank.
    """

    def __init__(self, config: Config, images: Images, views: Views, place: Place) -> None:
        self.images, self.views, self.place = images, views, place
        self.workers = config.data.workers

    def knn(self, model: MoCo) -> float:
        """Return the share of held-out images whose nearest neighbours give them their label."""
        parts = self._features(model)
        accuracy = -1.0
        if parts is not None:
            accuracy = knn_accuracy(*parts[0], *parts[1], classes=self.images.classes)
        return broadcast_object(self.place, accuracy)

    def linear(self, model: MoCo) -> float:
        """Return the share of held-out images that a linear classifier gives their label."""
        parts = self._features(model)
        return broadcast_object(
            self.place, -1.0 if parts is None else linear_probe(*parts[0], *parts[1])
        )

    def _loader(self, part: Any) -> DataLoader[Any]:
        share = range(self.place.rank, len(part), self.place.world_size)
        batches = [[share[i] for i in b] for b in whole_batches(len(share), EVALUATION_BATCH)]
        # Made anew each time, or its workers would stay beside those of the training.
        return make_loader(part, batches, self.workers)

    def _features(self, model: MoCo) -> tuple[Features, Features] | None:
        """Return features and labels of both parts on rank 0, None elsewhere."""
        encoder, device = model.encoder_q, self.place.device
        prepare = self.views.as_they_are
        parts = []
        with averaged_running_stats(encoder), self.views.autocast():
            for images in (self.images.train, self.images.test):
                part = extract_features(encoder, self._loader(images), device, prepare=prepare)
                everyones = gather_objects(self.place, tuple(t.cpu() for t in part))
                if everyones:
                    features, labels = (
                        torch.cat(list(t)).to(device) for t in zip(*everyones, strict=True)
                    )
                    parts.append((features, labels))
        return (parts[0], parts[1]) if parts else None


@contextmanager
def averaged_running_stats(encoder: nn.Module) -> Iterator[None]:
    """Average the running statistics over the ranks inside a block; then each has its own again."""
    before = [(buffer, buffer.clone()) for buffer in encoder.buffers()]
    synchronize_running_stats(encoder)
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def is_finite(model: MoCo) -> bool:
    """Whether all weights and keys are finite; the same on all ranks. Waits for the device."""
    tensors = [*model.parameters(), model.queue]
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def check_pool(config: Config, images: Images, world_size: int, keys: int = LEAK_KEYS) -> None:
    """Refuse a data set that is too small to measure the leak with, before it is trained on.

    Raises:
        ConfigError: a batch and its fresh company are more than there is.
    """
    batch, count = config.optim.batch_size, len(images.train)  # type: ignore[arg-type]
    if 2 * batch - keys_per_pass(config, world_size, min(keys, batch)) > count:
        raise ConfigError(
            f"{CALL}: --batch-size {batch} is more than half of the {count} images: the leak is "
            "measured with a batch and as many others"
        )


def keys_per_pass(config: Config, world_size: int, keys: int) -> int:
    """Return how many of the keys can be probed at once, each in another group.

    A query that is normalised in its own group knows nothing of the other groups' keys, whatever
    normalises these. One that is normalised with all samples knows of all keys.
    """
    if config.norm.bn == "sync":
        return 1
    return math.gcd(world_size * config.norm.groups, keys)


def find_leak(
    config: Config,
    model: MoCo,
    images: Images,
    views: Views,
    place: Place,
    *,
    batches: int = LEAK_BATCHES,
    keys: int = LEAK_KEYS,
) -> LeakReport:
    """Measure the leak of a model against its queue; see `measure_leak`.

    Args:
        config: the run.
        model: its model, in training mode.
        images: its data set.
        views: prepares the images.
        place: this rank.
        batches: how many batches are drawn.
        keys: how many keys are looked at in each.
    """
    keys = min(keys, config.optim.batch_size)

    def augment(pixels: Tensor) -> Tensor:
        with torch.autocast(place.device.type, enabled=False):  # as in training
            return views.augmented(pixels.to(place.device))

    generator = torch.Generator().manual_seed(config.run.seed)
    with views.autocast():
        return measure_leak(
            model.encoder_q,
            model.encode_key,
            images.train,
            augment,
            model.queue,
            batch_size=config.optim.batch_size,
            batches=batches,
            keys_per_batch=keys,
            keys_per_pass=keys_per_pass(config, place.world_size, keys),
            modules=(model,),
            generator=generator,
        )


def leak_figures(report: LeakReport | None) -> dict[str, Any]:
    """Return a report as plain values, as they are in a record; all None if there is none."""
    return {
        "leak": report and report.leak,
        "leak_standard_error": report and report.standard_error,
        "leak_interval": report and list(report.interval),
        "leak_as_trained": report and report.as_trained,
        "leak_fresh": report and report.fresh,
    }


def find_stability(
    config: Config, model: MoCo, images: Images, views: Views, place: Place
) -> dict[str, Any]:
    """Compare the scale of the key encoder's layers with mode `local`; see `stability`."""
    share = config.optim.batch_size // place.world_size
    first = range(place.rank * share, (place.rank + 1) * share)
    pixels = torch.stack([images.train[index][0] for index in first]).to(place.device)
    with views.autocast():
        report = stability(model.encoder_k, views.as_they_are(pixels))
    return {
        "layers": list(report.layers),
        "ratio": list(report.ratio),
        "spectral_radius": report.spectral_radius,
    }
