"""What a model is worth and whether it cheats: kNN, linear probe, leak and stability.

All ranks call these together; the model is afterwards what it was.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
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
from shuffle_batchnorm.probe.stability import stability

from . import checkpoint
from .build import Views, build_model
from .checkpoint import State
from .config import CALL, LEAK_BATCHES, LEAK_KEYS, Config, ConfigError, Device, from_dict, validate
from .data.images import Images
from .data.loading import load_data, make_loader
from .evaluation import extract_features, knn_accuracy, linear_probe
from .journal import warn
from .model import MoCo
from .random_state import own_random_state
from .ranks.control import broadcast_object, gather_objects
from .ranks.launch import Rank, launch, world_size
from .resume import restore_model

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
    """

    def __init__(
        self, config: Config, model: MoCo, images: Images, views: Views, rank: Rank
    ) -> None:
        self.config, self.model, self.images = config, model, images
        self.views, self.rank = views, rank

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
        return self._classified(lambda train, test: knn_accuracy(*train, *test, classes=classes))

    def linear(self) -> float | None:
        """Return the share of held-out images that a linear classifier gives their label.

        None if there is but one label.

        Communication: see `knn`.
        """
        return self._classified(lambda train, test: linear_probe(*train, *test))

    def leak(
        self, batches: int = LEAK_BATCHES, keys: int = LEAK_KEYS, *, by_layer: bool = False
    ) -> LeakReport:
        """Measure the leak of the model against its queue; see `measure_leak`.

        Args:
            batches: how many batches are drawn.
            keys: how many keys are measured in each.
            by_layer: whether to tell through which modules it comes.
        """
        config = self.config
        keys = min(keys, config.optim.batch_size)

        with self.views.autocast():
            return measure_leak(
                self.model.encoder_q,
                self.model.encode_key,
                self.images.train,
                self._augmented,
                self.model.queue,
                batch_size=config.optim.batch_size,
                batches=batches,
                keys_per_batch=keys,
                keys_per_pass=keys_per_pass(config, self.rank.world_size, keys),
                modules=(self.model,),
                generator=torch.Generator().manual_seed(config.run.seed),
                by_layer=by_layer,
            )

    def audit(self, encoder: Encoder) -> AuditReport:
        """Audit an encoder with the first training images; the next ones replace them."""
        size, count = self.config.optim.batch_size, len(self.images.train)  # type: ignore[arg-type]
        numbers = torch.arange(2 * size) % count
        batch, pool = numbers[:size].chunk(self.rank.world_size), numbers[size:]
        with self.views.autocast():
            inputs, others = (
                self._augmented(torch.stack([self.images.train[k][0] for k in part.tolist()]))
                for part in (batch[self.rank.index], pool)
            )
            model = self.model.encoder_k if encoder == "key" else self.model.encoder_q
            return audit(model, inputs, replace=others)

    def _augmented(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.rank.device.type, enabled=False):  # as in training
            return self.views.augmented(pixels.to(self.rank.device))

    def stability(self) -> Figures:
        """Compare the scale of the key encoder's layers with mode `local`; see `stability`."""
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
        own = extract_features(encoder, loader, rank.device, prepare=self.views.as_they_are)
        everyones = gather_objects(rank, (own[0].cpu(), own[1].cpu()))
        if not everyones:
            return None
        features, labels = zip(*everyones, strict=True)
        return torch.cat(features).to(rank.device), torch.cat(labels).to(rank.device)


Measure = Callable[[Measurements], Figures]


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
    if queue <= count:
        return list(images.remarks)
    own = round(queue / count)
    long = f"--queue {queue} is longer than the {count} images: among a query's negatives are about"
    return [*images.remarks, f"{long} {own} older key{'s' if own > 1 else ''} of its own image"]


def keys_per_pass(config: Config, world_size: int, keys: int) -> int:
    """Return how many of the keys can be probed at once, each in another group.

    A query that is normalised in its own group knows nothing of the other groups' keys, whatever
    normalises these. One that is normalised with all samples knows of all keys.
    """
    if config.norm.bn == "sync":
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


def evaluate_checkpoint(
    path: Path, ranks: int | None = None, device: Device = "auto", data_path: Path | None = None
) -> Figures:
    """Return kNN and linear-probe accuracy of the query encoder in a checkpoint.

    Args:
        path: of the checkpoint; the rest of the configuration is in it.
        ranks: processes to start; as many as trained it, by default.
        device: where to compute.
        data_path: of the data set, if it has moved.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: `ranks` does not divide its groups.
        DataError: no such data set.
    """
    return _launch("evaluate", _evaluate, path, ranks, device, data_path)


def probe_checkpoint(
    path: Path,
    ranks: int | None = None,
    device: Device = "auto",
    data_path: Path | None = None,
    *,
    batches: int = LEAK_BATCHES,
    keys: int = LEAK_KEYS,
    by_layer: bool = False,
) -> Figures:
    """Return the leak and the stability of a checkpoint; see `measure_leak`.

    Args:
        path: see `evaluate_checkpoint`, as for the next three.
        ranks: processes to start.
        device: where to compute.
        data_path: of the data set.
        batches: how many batches are drawn, 2 or more.
        keys: how many keys are measured in each.
        by_layer: whether to tell through which modules the leak comes.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: `ranks` does not divide its groups, or a number is out of range.
        DataError: no such data set.
    """
    for name, value, least in (("--batches", batches, 2), ("--keys", keys, 1)):
        if value < least:
            raise ConfigError(f"probe: {name} must be at least {least}, got {value}")
    probe = functools.partial(_probe, batches=batches, keys=keys, by_layer=by_layer)
    return _launch("probe", probe, path, ranks, device, data_path)


def audit_checkpoint(
    path: Path,
    ranks: int | None = None,
    device: Device = "auto",
    data_path: Path | None = None,
    *,
    encoder: Encoder = "key",
) -> Figures:
    """Return what `audit` says of an encoder in a checkpoint, for a batch as in training.

    Args and errors: see `evaluate_checkpoint`; `encoder` is the key or the query encoder.
    """
    what = functools.partial(_audit, encoder=encoder)
    return _launch("audit", what, path, ranks, device, data_path)


def _launch(
    call: str, what: Measure, path: Path, ranks: int | None, device: Device, data_path: Path | None
) -> Figures:
    """Measure something of a checkpoint's model, on its ranks; `call` is for messages."""
    state = checkpoint.load(path)
    config = from_dict(state["config"])
    total = state["world_size"] * config.norm.groups
    size = world_size(state["world_size"] if ranks is None else ranks, device)
    if size < 1 or total % size:
        raise ConfigError(f"{call}: --ranks {size} does not divide the {total} groups of the run")
    config = replace(
        config,
        data=replace(config.data, data_path=data_path or config.data.data_path),
        norm=replace(config.norm, groups=total // size),
        # Compiling takes longer than measuring.
        run=replace(config.run, ranks=size, device=device, compile=False),
    )
    validate(config, size)
    figures: Figures = launch(_measure, what, config, state, ranks=size, device=device)
    return figures


def _measure(rank: Rank, what: Measure, config: Config, state: State) -> Figures:
    with own_random_state():
        images = load_data(config.data)
        model = build_model(config, images, rank.device)
        restore_model(model, state, rank)
        measurements = Measurements(config, model, images, Views(config, images, rank), rank)
        if not measurements.is_finite():
            raise ConfigError("the model has diverged: not all of its numbers are finite")
        figures = what(measurements)
    return {"epoch": state["epoch"], "step": state["step"], "bn": config.norm.bn, **figures}


def _evaluate(measurements: Measurements) -> Figures:
    for remark in measurements.images.remarks if measurements.rank.index == 0 else ():
        warn("evaluate", remark)
    return {"knn": measurements.knn(), "linear": measurements.linear()}


def _audit(measurements: Measurements, *, encoder: Encoder) -> Figures:
    report = measurements.audit(encoder)
    return {"encoder": encoder, **asdict(report), "text": str(report)}


def _probe(measurements: Measurements, *, batches: int, keys: int, by_layer: bool) -> Figures:
    config = measurements.config
    check_images(config, measurements.images, measurements.rank.world_size, keys)
    if keys > config.optim.batch_size:
        raise ConfigError(f"probe: --keys {keys} is more than the batch, {config.optim.batch_size}")
    report = measurements.leak(batches, keys, by_layer=by_layer)
    layers = {"by_layer": report.by_layer, "layer_intervals": report.layer_intervals}
    return {
        **leak_figures(report),
        **(layers if by_layer else {}),
        "stability": measurements.stability(),
    }
