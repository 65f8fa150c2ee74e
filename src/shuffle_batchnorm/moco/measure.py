"""What a model is worth and whether it cheats: kNN, linear probe, leak and stability.

All ranks call these together; the model is afterwards what it was.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from shuffle_batchnorm.norm.contexts import synchronize_running_stats
from shuffle_batchnorm.probe.audit import audit
from shuffle_batchnorm.probe.audit_report import AuditReport
from shuffle_batchnorm.probe.isolation import isolated
from shuffle_batchnorm.probe.leak import measure_leak
from shuffle_batchnorm.probe.leak_report import LeakReport
from shuffle_batchnorm.probe.progress import SILENT, Bar, Console
from shuffle_batchnorm.probe.stability import stability

from .build import Views
from .config import CALL, LEAK_BATCHES, LEAK_KEYS, Config, ConfigError
from .data.images import Images
from .data.loading import make_loader
from .evaluation import extract_features, knn_accuracy, linear_probe
from .model import MoCo
from .ranks.control import broadcast_object, gather_objects
from .ranks.launch import Rank

EVALUATION_BATCH = 256
Features = tuple[Tensor, Tensor]
Figures = dict[str, Any]
Encoder = Literal["key", "query"]


class Measurements:
    """The measurements of a model.

    Args:
        config: the run.
        model: its model, in training mode.
        images: its data set.
        views: prepares the images.
        rank: this rank.
        console: where to say what is measured.
    """

    def __init__(
        self,
        config: Config,
        model: MoCo,
        images: Images,
        views: Views,
        rank: Rank,
        console: Console = SILENT,
    ) -> None:
        self.config, self.model, self.images = config, model, images
        self.views, self.rank, self.console = views, rank, console

    def facts(self) -> Figures:
        """Count ranks, images, and the query encoder's parameters, head included."""
        parameters = sum(parameter.numel() for parameter in self.model.encoder_q.parameters())
        return {
            "world_size": self.rank.world_size,
            "device": self.rank.device.type,
            "train_images": len(self.images.train),  # type: ignore[arg-type]
            "test_images": len(self.images.test),  # type: ignore[arg-type]
            "parameters": parameters,
        }

    def is_finite(self) -> bool:
        """Whether all weights and keys are finite; the same on all ranks. Waits for the device."""
        tensors = [*self.model.parameters(), self.model.queue]
        return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())

    def knn(self) -> float | None:
        """Return the share of held-out images whose nearest neighbours give them their label.

        None if there is but one label.

        Communication: that of the running statistics' average; features to rank 0, the result back.
        """
        classes = self.images.classes
        self.console.status("kNN: encoding images")
        return self._classified(lambda train, test: knn_accuracy(*train, *test, classes=classes))

    def linear(self) -> float | None:
        """Return the share of held-out images that a linear classifier gives their label.

        None if there is but one label.

        Communication: see `knn`.
        """
        self.console.status("linear probe: encoding images")
        return self._classified(lambda train, test: linear_probe(*train, *test))

    def leak(
        self, batches: int = LEAK_BATCHES, keys: int = LEAK_KEYS, *, by_layer: bool = False
    ) -> LeakReport:
        """Measure the leak of the model against its queue; see `measure_leak`.

        Without a queue the negatives are the other keys measured, so fewer than in training.

        Args:
            batches: how many batches are drawn.
            keys: how many keys are measured in each.
            by_layer: whether to tell through which modules it comes.
        """
        config = self.config
        keys = min(keys, config.optim.batch_size)
        self.console.status(f"measuring the leak: {keys} keys in each of {batches} batches")
        with self.views.autocast():
            return measure_leak(
                self.model.encoder_q,
                self.model.encode_key,
                self.images.train,
                self._augmented,
                self.model.queue if config.norm.has_queue else None,
                batch_size=config.optim.batch_size,
                batches=batches,
                keys_per_batch=keys,
                keys_per_pass=keys_per_pass(config, self.rank.world_size, keys),
                modules=(self.model,),
                generator=torch.Generator().manual_seed(config.run.seed),
                progress=self.console.shown,
                by_layer=by_layer,
            )

    def audit(self, encoder: Encoder) -> AuditReport:
        """Audit an encoder with the first training images; the next ones replace them."""
        self.console.status(f"auditing the {encoder} encoder")
        size, count = self.config.optim.batch_size, len(self.images.train)  # type: ignore[arg-type]
        numbers = torch.arange(2 * size) % count
        batch, pool = numbers[:size].chunk(self.rank.world_size), numbers[size:]
        with self.views.autocast():
            inputs, others = (
                self._augmented(torch.stack([self.images.train[k][0] for k in part.tolist()]))
                for part in (batch[self.rank.index], pool)
            )
            model = self.model.encoder_k if encoder == "key" else self.model.encoder_q
            return audit(model, inputs, replace=others, progress=self.console.shown)

    def _augmented(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.rank.device.type, enabled=False):  # as in training
            return self.views.augmented(pixels.to(self.rank.device))

    def stability(self) -> Figures:
        """Compare the scale of the key encoder's layers with mode `local`; see `stability`."""
        self.console.status("comparing activations with local batch norm")
        share = self.config.optim.batch_size // self.rank.world_size
        first = range(self.rank.index * share, (self.rank.index + 1) * share)
        pixels = torch.stack([self.images.train[index][0] for index in first])
        with self.views.autocast():
            views = self.views.as_they_are(pixels.to(self.rank.device))
            report = stability(self.model.encoder_k, views)
        return {
            "layers": list(report.layers),
            "ratio": list(report.ratio),
            "spectral_radius": report.spectral_radius,
        }

    def _classified(self, classify: Callable[[Features, Features], float]) -> float | None:
        """Return on all ranks what comes of the features of both parts, which rank 0 has.

        The ranks encode with the mean of their running statistics.
        """
        if self.images.classes < 2:
            return None
        encoder = self.model.encoder_q
        with isolated(encoder.modules(), []), self.views.autocast():
            synchronize_running_stats(encoder)
            train, test = (self._features(part) for part in (self.images.train, self.images.test))
        accuracy = classify(train, test) if train is not None and test is not None else -1.0
        return broadcast_object(self.rank, accuracy)

    def _features(self, part: Dataset[Any]) -> Features | None:
        """Return features and labels of a part on rank 0; every rank encodes a share of it."""
        rank, encoder = self.rank, self.model.encoder_q
        share = range(rank.index, len(part), rank.world_size)  # type: ignore[arg-type]
        batches = BatchSampler(share, EVALUATION_BATCH, drop_last=False)
        # Made anew each time, or its workers would stay beside those of the training.
        loader = make_loader(part, batches, self.config.data.workers)
        bar = Bar(self.console, "batch", len(batches))

        def prepare(pixels: Tensor) -> Tensor:
            bar.advance()
            return self.views.as_they_are(pixels)

        own = extract_features(encoder, loader, rank.device, prepare=prepare)
        everyones = gather_objects(rank, (own[0].cpu(), own[1].cpu()))
        if not everyones:
            return None
        features, labels = zip(*everyones, strict=True)
        return torch.cat(features).to(rank.device), torch.cat(labels).to(rank.device)


def check_images(config: Config, images: Images, world_size: int, keys: int = LEAK_KEYS) -> None:
    """Refuse a data set that is too small to measure the leak with, before it is trained on.

    Raises:
        ConfigError: a batch and a fresh one are more than there is.
    """
    batch, count = config.optim.batch_size, len(images.train)  # type: ignore[arg-type]
    if 2 * batch - keys_per_pass(config, world_size, min(keys, batch)) > count:
        raise ConfigError(
            f"{CALL}: --batch-size {batch} is more than half of the {count} images: the leak is "
            "measured with a batch and as many others"
        )


def remarks(config: Config, images: Images) -> list[str]:
    """Return what a user should know of a run with these images before it begins."""
    queue, count = config.moco.queue, len(images.train)  # type: ignore[arg-type]
    if queue <= count or not config.norm.has_queue:
        return list(images.remarks)
    own = round(queue / count)
    long = f"--queue {queue} is longer than the {count} images: among a query's negatives are about"
    return [*images.remarks, f"{long} {own} older key{'s' if own > 1 else ''} of its own image"]


def keys_per_pass(config: Config, world_size: int, keys: int) -> int:
    """Return how many of the keys can be probed at once, each in another group.

    A query that is normalised in its own group knows nothing of the other groups' keys, whatever
    normalises these. One that is normalised with all samples knows of all keys.
    """
    if config.norm.is_global:
        return 1
    return math.gcd(world_size * config.norm.groups, keys)


def leak_figures(report: LeakReport | None) -> Figures:
    """Return a report as plain values, as they are in a record; all None if there is none."""
    return {
        "leak": report and report.leak,
        "leak_standard_error": report and report.standard_error,
        "leak_interval": report and list(report.interval),
        "leak_as_trained": report and report.as_trained,
        "leak_fresh": report and report.fresh,
    }
