"""The state of all random number generators of a process, as a checkpoint holds it."""

import random
from contextlib import AbstractContextManager
from typing import Any

import torch

from shuffle_batchnorm.comm.world import resolve
from shuffle_batchnorm.probe.isolation import isolated

from .config import CALL

State = dict[str, Any]


def get_random_state(device: torch.device) -> State:
    """Return the state of every random number generator of this process, as plain values."""
    import numpy as np  # comes with the extra; the others come with torch

    # The old generator, because that is the one that other packages draw from.
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    # As int64: torch can't send unsigned ones from rank to rank.
    keys = torch.from_numpy(numpy["state"]["key"].astype("int64"))
    numpy["state"] = {**numpy["state"], "key": keys}
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": numpy,
        "python": (version, torch.tensor(numbers), gauss_next),
    }


def set_random_state(state: State, device: torch.device) -> None:
    """Set every random number generator of this process to what `get_random_state` returned."""
    import numpy as np

    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    numpy = state["numpy"]
    keys = numpy["state"]["key"].numpy().astype("uint32")
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": keys}})  # noqa: NPY002
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss_next))


def own_random_state() -> AbstractContextManager[None]:
    """Give a block random states that are its own to seed; the caller's come back afterwards.

    The sample shuffle's state on all ranks is one of them.
    """
    return isolated([], [resolve(None, CALL)])
