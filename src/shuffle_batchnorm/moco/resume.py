"""A run's folder when it is started: empty, a checkpoint to go on from, or a whole run."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from .checkpoint import DAMAGED, State, read_object, refuse_changes
from .config import CALL, Config, ConfigError, to_dict
from .journal import CONFIG, RECORD, warn
from .model import MoCo
from .ranks.launch import Rank

# The same on all ranks; other buffers are each rank's own.
_COMMON = ("queue", "queue_pointer")


class RunState(NamedTuple):
    """What a folder holds: a checkpoint, the record of a run that is at its end, or neither."""

    checkpoint: State | None = None
    record: dict[str, Any] | None = None


def find_run(config: Config, rank: Rank) -> RunState:
    """Find the run in the folder of a configuration, and check that this one may go on with it.

    A last checkpoint that is damaged is moved aside, and the one before it taken: `checkpoint.save`
    would put the damaged one in its place.

    Raises:
        ConfigError: there is one, and `resume` isn't set.
        CheckpointError: it was begun otherwise, or is damaged.
    """
    folder = config.run.output
    record, paths = folder / RECORD, checkpoint.find(folder)
    if not config.run.resume:
        if record.exists() or paths:
            cure = "--resume prints its result" if record.exists() else "go on with --resume"
            raise ConfigError(
                f"{CALL}: there is a run in {folder}: {cure}, or choose another --output"
            )
        return RunState()
    where = {"world_size": rank.world_size, "device": rank.device.type}
    now = {"config": to_dict(config), **where}
    if record.exists():
        before = read_object(folder / CONFIG, {"config": dict})
        refuse_changes(CALL, folder / CONFIG, before, now)
        return RunState(record=read_object(record, {"knn": object, "leak": object}))
    if not paths:
        return RunState()
    path, state, errors = checkpoint.load_latest(paths)
    refuse_changes(CALL, path, state, now)
    for error in errors:
        paths[0].replace(folder / DAMAGED)
        warn(CALL, f"{error}; it is {DAMAGED} now, and the run goes on from {path.name}")
    return RunState(checkpoint=state)


def own_buffers(model: MoCo) -> dict[str, Tensor]:
    """Return the buffers of a model that differ between ranks: running statistics."""
    return {name: b for name, b in model.named_buffers() if name not in _COMMON}


@torch.no_grad()
def restore_model(model: MoCo, state: State, rank: Rank) -> None:
    """Give a model the weights, queue and running statistics of a checkpoint.

    On another number of ranks than it was written by, every rank gets the mean of their running
    statistics.
    """
    model.load_state_dict(state["model"])
    everyones = [part["buffers"] for part in state["ranks"]]
    for name, buffer in own_buffers(model).items():
        if len(everyones) == rank.world_size:
            buffer.copy_(everyones[rank.index][name])
        else:
            values = torch.stack([buffers[name] for buffers in everyones])
            mean = values.mean(0) if values.is_floating_point() else values[0]
            buffer.copy_(mean)
