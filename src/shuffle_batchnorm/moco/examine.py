"""What is in a checkpoint: how good its features are, and how much it cheats."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint
from .build import Views, build_model
from .checkpoint import State
from .config import LEAK_BATCHES, LEAK_KEYS, Config, ConfigError, Device, from_dict, validate
from .data.images import Images
from .data.loading import load_data
from .measure import Evaluation, check_pool, find_leak, find_stability, is_finite, leak_figures
from .model import MoCo
from .random_state import own_random_state
from .ranks.launch import Place, launch, world_size
from .resume import restore_model

Figures = dict[str, Any]


def evaluate_checkpoint(
    path: Path, ranks: int | None = None, device: Device = "auto", data_path: Path | None = None
) -> Figures:
    """Return kNN and linear-probe accuracy of the query encoder in a checkpoint.

    Args:
        path: of the checkpoint; its configuration says what to look at.
        ranks: processes to start; as many as trained it, by default.
        device: where to compute.
        data_path: of the data set, if it has moved.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: `ranks` does not divide its groups.
        DataError: no such data set.
    """
    return _launch(_evaluate, "evaluate", path, ranks, device, data_path)


def probe_checkpoint(
    path: Path,
    ranks: int | None = None,
    device: Device = "auto",
    data_path: Path | None = None,
    *,
    batches: int = LEAK_BATCHES,
    keys: int = LEAK_KEYS,
) -> Figures:
    """Return the leak and the stability of a checkpoint; see `measure_leak`.

    Args:
        path: of the checkpoint; its configuration says what to look at.
        ranks: processes to start; as many as trained it, by default.
        device: where to compute.
        data_path: of the data set, if it has moved.
        batches: how many batches are drawn, 2 or more.
        keys: how many keys are looked at in each.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: `ranks` does not divide its groups, or a number is out of range.
        DataError: no such data set.
    """
    for name, value, least in (("--batches", batches, 2), ("--keys", keys, 1)):
        if value < least:
            raise ConfigError(f"probe: {name} must be at least {least}, got {value}")
    return _launch(_probe, "probe", path, ranks, device, data_path, batches, keys)


def _launch(
    function: Callable[..., Figures],
    call: str,
    path: Path,
    ranks: int | None,
    device: Device,
    data_path: Path | None,
    *args: int,
) -> Figures:
    state = checkpoint.load(path)
    config = from_dict(state["config"])
    total = state["world_size"] * config.norm.groups
    ranks = state["world_size"] if ranks is None else ranks
    # Compiling takes longer than looking.
    run = replace(config.run, ranks=ranks, device=device, compile=False)
    size = world_size(run)
    if size < 1 or total % size:
        raise ConfigError(f"{call}: --ranks {size} does not divide the {total} groups of the run")
    data = config.data
    if data_path is not None:
        data = replace(data, data_path=data_path)
    norm = replace(config.norm, groups=total // size)
    config = replace(config, run=run, data=data, norm=norm)
    validate(config, size)
    figures: Figures = launch(_examine, run, function, config, state, args, graceful=False)
    return figures


def _examine(
    place: Place,
    function: Callable[..., Figures],
    config: Config,
    state: State,
    args: tuple[int, ...],
) -> Figures:
    with ExitStack() as stack:
        stack.enter_context(own_random_state(place.device))
        images = load_data(config.data)
        model = build_model(config, images, place.device)
        restore_model(model, state, place)
        if not is_finite(model):
            raise ConfigError("the model has diverged: not all of its numbers are finite")
        views = Views(config, images, place)
        figures = function(config, model, images, views, place, *args)
    return {"epoch": state["epoch"], "step": state["step"], "bn": config.norm.bn, **figures}


def _evaluate(config: Config, model: MoCo, images: Images, views: Views, place: Place) -> Figures:
    evaluation = Evaluation(config, images, views, place)
    return {"knn": evaluation.knn(model), "linear": evaluation.linear(model)}


def _probe(
    config: Config,
    model: MoCo,
    images: Images,
    views: Views,
    place: Place,
    batches: int,
    keys: int,
) -> Figures:
    check_pool(config, images, place.world_size, keys)
    if keys > config.optim.batch_size:
        raise ConfigError(f"probe: --keys {keys} is more than the batch, {config.optim.batch_size}")
    report = find_leak(config, model, images, views, place, batches=batches, keys=keys)
    return {
        **leak_figures(report),
        "stability": find_stability(config, model, images, views, place),
    }
