"""A run's folder at the start of a session: nothing, something to go on from, or a whole run."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from .checkpoint import State
from .config import CALL, Config, ConfigError, to_dict
from .journal import CONFIG, RECORD, read_json
from .model import MoCo
from .ranks.launch import Place

# The same on all ranks; other buffers are each rank's own.
_COMMON = ("queue", "queue_pointer")


class Begun(NamedTuple):
    """What a folder holds: a checkpoint, or the record of a run that is at its end."""

    state: State | None = None
    record: dict[str, Any] | None = None


def find_run(config: Config, place: Place) -> Begun:
    """Look for a run in the folder of a configuration, and whether this one may go on with it.

    Raises:
        ConfigError: there is one, and `resume` isn't set.
        CheckpointError: it was begun otherwise, or is damaged.
    """
    folder = config.run.output
    record, path = folder / RECORD, checkpoint.find(folder)
    if not config.run.resume:
        if record.exists() or path is not None:
            raise ConfigError(
                f"{CALL}: there is a run in {folder}: go on with it with --resume, or choose "
                "another --output"
            )
        return Begun()
    if record.exists():
        described = folder / CONFIG
        before = read_json(described)
        checkpoint.check_flags(described, before["config"], to_dict(config))
        if before["world_size"] == place.world_size:
            return Begun(record=read_json(record))
    if path is None:
        return Begun()
    state = checkpoint.load(path)
    checkpoint.check_flags(path, state["config"], to_dict(config))
    checkpoint.check_place(path, state, place.world_size, place.device.type)
    return Begun(state=state)


def own_buffers(model: MoCo) -> dict[str, Tensor]:
    """Return the buffers of a model that differ between ranks: running statistics."""
    return {name: b for name, b in model.named_buffers() if name not in _COMMON}


@torch.no_grad()
def restore_model(model: MoCo, state: State, place: Place) -> None:
    """Give a model the weights, queue and running statistics of a checkpoint.

    On another number of ranks than it was written by, every rank gets the mean of their running
    statistics.
    """
    model.load_state_dict(state["model"])
    everyones = [part["buffers"] for part in state["ranks"]]
    for name, buffer in own_buffers(model).items():
        if len(everyones) == place.world_size:
            buffer.copy_(everyones[place.rank][name])
        else:
            values = torch.stack([buffers[name] for buffers in everyones])
            mean = values.mean(0) if values.is_floating_point() else values[0]
            buffer.copy_(mean)
