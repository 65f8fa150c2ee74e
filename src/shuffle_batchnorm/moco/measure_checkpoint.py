"""Measure the model in a checkpoint, on its ranks: evaluate, probe and audit."""

import functools
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from shuffle_batchnorm.probe.progress import Console

from . import checkpoint
from .build import Views, build_model
from .checkpoint import State
from .config import LEAK_BATCHES, LEAK_KEYS, Config, ConfigError, Device, from_dict, validate
from .data.loading import load_data
from .journal import setting, warn
from .measure import Encoder, Figures, Measurements, check_images, leak_figures
from .random_state import own_random_state
from .ranks.launch import Rank, launch, world_size
from .resume import restore_model

Measure = Callable[[Measurements], Figures]


def evaluate_checkpoint(
    path: Path,
    ranks: int | None = None,
    device: Device = "auto",
    data_path: Path | None = None,
    *,
    progress: bool | None = None,
) -> Figures:
    """Return kNN and linear-probe accuracy of the query encoder in a checkpoint.

    Args:
        path: of the checkpoint; the rest of the configuration is in it.
        ranks: processes to start; as many as trained it, by default.
        device: where to compute.
        data_path: of the data set, if it has moved.
        progress: whether the first rank says on stderr what it does; None for: in a terminal only.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: `ranks` does not divide its groups.
        DataError: no such data set.
    """
    return _launch("evaluate", _evaluate, path, ranks, device, data_path, progress)


def probe_checkpoint(
    path: Path,
    ranks: int | None = None,
    device: Device = "auto",
    data_path: Path | None = None,
    *,
    batches: int = LEAK_BATCHES,
    keys: int = LEAK_KEYS,
    by_layer: bool = False,
    progress: bool | None = None,
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
        progress: see `evaluate_checkpoint`.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: `ranks` does not divide its groups, or a number is out of range.
        DataError: no such data set.
    """
    for name, value, least in (("--batches", batches, 2), ("--keys", keys, 1)):
        if value < least:
            raise ConfigError(f"probe: {name} must be at least {least}, got {value}")
    probe = functools.partial(_probe, batches=batches, keys=keys, by_layer=by_layer)
    return _launch("probe", probe, path, ranks, device, data_path, progress)


def audit_checkpoint(
    path: Path,
    ranks: int | None = None,
    device: Device = "auto",
    data_path: Path | None = None,
    *,
    encoder: Encoder = "key",
    progress: bool | None = None,
) -> Figures:
    """Return what `audit` says of an encoder in a checkpoint, for a batch as in training.

    Args and errors: see `evaluate_checkpoint`; `encoder` is the key or the query encoder.
    """
    what = functools.partial(_audit, encoder=encoder)
    return _launch("audit", what, path, ranks, device, data_path, progress)


def _launch(
    call: str,
    what: Measure,
    path: Path,
    ranks: int | None,
    device: Device,
    data_path: Path | None,
    progress: bool | None,
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
    console = Console(call, progress)
    work = _measure, call, what, config, state, progress
    figures: Figures = launch(*work, ranks=size, device=device, console=console)
    return figures


def _measure(
    rank: Rank, call: str, what: Measure, config: Config, state: State, progress: bool | None
) -> Figures:
    console = Console(call, progress if rank.index == 0 else False)
    with own_random_state(), closing(console):
        console.status(f"reading {config.data.dataset}")
        images = load_data(config.data)
        console.say(setting(config, images, rank.world_size, rank.device))
        model = build_model(config, images, rank.device)
        restore_model(model, state, rank)
        views = Views(config, images, rank)
        measurements = Measurements(config, model, images, views, rank, console)
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
    if keys == 1 and not config.norm.has_queue:
        raise ConfigError("probe: --keys 1 leaves no negative: --bn simclr has no queue")
    report = measurements.leak(batches, keys, by_layer=by_layer)
    layers = {"by_layer": report.by_layer, "layer_intervals": report.layer_intervals}
    return {
        **leak_figures(report),
        "leak_verdict": report.verdict,
        **(layers if by_layer else {}),
        "stability": measurements.stability(),
    }
