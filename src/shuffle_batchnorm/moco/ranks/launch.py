"""Ranks: started here or by torchrun, given their devices, and brought together.

One rank works in this process, without a process group. Several are spawned and meet at a file;
under torchrun, or in a process group that exists already, this process is one of them.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shuffle_batchnorm.moco.config import CALL, ConfigError, RunConfig

from .spawn import RankError, Stopped, StopRequest, listening, spawn_ranks

__all__ = [
    "Place",
    "RankError",
    "Stopped",
    "find_device",
    "is_first",
    "launch",
    "under_torchrun",
    "world_size",
]


class Place(NamedTuple):
    """One rank's place among W ranks."""

    rank: int
    world_size: int
    device: torch.device
    stop: StopRequest
    control: "dist.ProcessGroup | None"  # gloo: for what must not wait for the device


def world_size(run: RunConfig) -> int:
    """Return W, the number of ranks that `launch` will start or join."""
    if dist.is_initialized():
        return dist.get_world_size()
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if run.ranks is not None:
        return run.ranks
    return 1 if run.device == "cpu" else max(1, _gpus())


def is_first() -> bool:
    """Return whether this process speaks for this machine's ranks."""
    return not under_torchrun() or os.environ["LOCAL_RANK"] == "0"


def find_device(run: RunConfig, local_rank: int, local_size: int) -> torch.device:
    """Return the device of a rank: its own GPU, or the CPU.

    Raises:
        ConfigError: --device cuda, and there are fewer GPUs than ranks here.
    """
    gpus = _gpus()
    if run.device == "cuda" and gpus < local_size:
        ranks = f"{local_size} rank{'s' if local_size > 1 else ''}"
        raise ConfigError(f"{CALL}: --device cuda: {ranks} here, but {gpus} GPUs; each needs one")
    # NCCL refuses two ranks on one GPU.
    if run.device == "cpu" or gpus < local_size:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def launch(
    function: Callable[..., Any], run: RunConfig, *args: object, graceful: bool = True
) -> Any:
    """Call ``function(place, *args)`` on every rank; return what rank 0, or this one, returned.

    Args:
        function: at the top level of a module, since it is pickled by reference.
        run: how many ranks, and where.
        *args: handed to every rank.
        graceful: the function looks at ``place.stop`` and stops by itself; False ends it at once.

    Raises:
        ConfigError: there is no such device.
        Stopped: a signal asked for it.
        RankError: a rank died.
        Exception: what a rank raised, the first in time.
    """
    hear = listening if graceful else lambda: nullcontext(StopRequest())
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        device = find_device(run, int(os.environ.get("LOCAL_RANK", rank)), local_size)
        with hear() as stop:
            return _join(function, args, Place(rank, size, device, stop, None))
    if under_torchrun():
        local_rank = int(os.environ["LOCAL_RANK"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        device = find_device(run, local_rank, local_size)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        with hear() as stop:
            place = Place(rank, size, device, stop, None)
            return _meet(function, args, place, "env://", local_size)
    size = world_size(run)
    device = find_device(run, 0, size)
    if size == 1:
        with hear() as stop:
            return _meet(function, args, Place(0, 1, device, stop, None), "", 1)
    # They meet at a file in a folder of their own, not at a port: nobody else can have taken it.
    with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        work = function, args, run, size, rendezvous
        return spawn_ranks(_be_spawned, size, *work, graceful=graceful)


def _be_spawned(
    rank: int,
    stop: StopRequest,
    function: Callable[..., Any],
    args: tuple[object, ...],
    run: RunConfig,
    size: int,
    rendezvous: str,
) -> Any:
    place = Place(rank, size, find_device(run, rank, size), stop, None)
    return _meet(function, args, place, rendezvous, size)


def _meet(
    function: Callable[..., Any],
    args: tuple[object, ...],
    place: Place,
    rendezvous: str,
    local_size: int,
) -> Any:
    """Be one rank: meet the others, call the function, part."""
    is_gpu = place.device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(place.device)
    elif local_size > 1:  # they share the cores: more threads each would only wait for one another
        torch.set_num_threads(1)
    if place.world_size == 1:
        return function(place, *args)
    backend = "nccl" if is_gpu else "gloo"
    dist.init_process_group(
        backend, init_method=rendezvous, rank=place.rank, world_size=place.world_size
    )
    result = _join(function, args, place)
    # Not after an error: it would wait for peers that have gone.
    dist.destroy_process_group()
    return result


def _join(function: Callable[..., Any], args: tuple[object, ...], place: Place) -> Any:
    return function(place._replace(control=dist.new_group(backend="gloo")), *args)


def under_torchrun() -> bool:
    """Return whether torchrun, or what speaks its language, made this process one of the ranks."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
