"""Ranks: started here or by torchrun, given their devices, and brought together.

One rank works in this process, without a process group. Several are spawned and meet at a file;
under torchrun, or in a process group that exists already, this process is one of them. What is
imported here is torch and the standard library, so that `main.py` needs no more.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shuffle_batchnorm.moco.config import CALL, ConfigError
from shuffle_batchnorm.probe.progress import Console

from .spawn import StopRequest, noting_signals, spawn_ranks, stop_late


@dataclass(frozen=True)
class Rank:
    """One of the W ranks of a run, seen from its own process.

    Attributes:
        index: which one, from 0.
        world_size: W.
        device: where it computes.
        stop: the signal that asked it to stop.
        control: a gloo group for what must not wait for the device; None for one rank.
    """

    index: int
    world_size: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    control: "dist.ProcessGroup | None" = None


def launch(
    function: Callable[..., Any],
    *args: object,
    ranks: int | None = None,
    device: str = "auto",
    gpus: Sequence[int] | None = None,
    graceful: bool = False,
    console: Console | None = None,
) -> Any:
    """Call ``function(rank, *args)`` on every rank; return what rank 0, or this one, returned.

    Args:
        function: at the top level of a module, since it is pickled by reference.
        *args: handed to every rank.
        ranks: how many to start (None: one per GPU, or 1); an existing group or torchrun decides
            itself.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU each if there are enough.
        gpus: which of this machine's GPUs its ranks take; by default the first ones.
        graceful: the function reads ``rank.stop`` and stops by itself; False ends it at once.
        console: where to say that processes start.

    Raises:
        ConfigError: there is no such device.
        Stopped: a signal asked for it.
        RankError: the process of a rank died.
        Exception: what a rank raised, the first in time.
    """
    noting = noting_signals if graceful else lambda: nullcontext(StopRequest())
    size = world_size(ranks, device)
    is_grouped = dist.is_initialized()
    if is_grouped or under_torchrun() or size == 1:
        index = dist.get_rank() if is_grouped else int(os.environ.get("RANK", "0"))
        local_index = int(os.environ.get("LOCAL_RANK", index))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        found = find_device(device, local_index, local_size, gpus)
        with noting() as stop:
            rank = Rank(index, size, found, stop)
            if is_grouped:
                result = _with_control(function, args, rank)
            else:
                result = _meet(function, args, rank, "env://", local_size)
        # Ranks of torchrun agree on it themselves: not all of them may have the signal.
        if size == 1:
            stop_late(stop.signum)
        return result
    # All of them here: what is refused is refused before a process starts.
    devices = [find_device(device, index, size, gpus) for index in range(size)]
    if console is not None:
        console.status(f"starting {size} ranks on {devices[0].type}")
    # They meet at a file in a folder of their own, not at a port: nobody else can have taken it.
    with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        work = function, args, devices, rendezvous
        return spawn_ranks(_be_spawned, size, *work, graceful=graceful)


def world_size(ranks: int | None, device: str) -> int:
    """Return W, the number of ranks that `launch` will start or join."""
    if dist.is_initialized():
        return dist.get_world_size()
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if ranks is not None:
        return ranks
    return 1 if device == "cpu" else max(1, _gpus())


def is_first() -> bool:
    """Return whether this process tells of errors, which any machine's ranks may have."""
    return not under_torchrun() or os.environ["LOCAL_RANK"] == "0"


def is_rank_0() -> bool:
    """Return whether this process speaks for all ranks, of progress and results."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def under_torchrun() -> bool:
    """Return whether torchrun, or what speaks its language, made this process one of the ranks."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def find_device(
    device: str, local_index: int, local_size: int, gpus: Sequence[int] | None = None
) -> torch.device:
    """Return the device of a rank: its own GPU, or the CPU.

    Raises:
        ConfigError: ``cuda``, and there are fewer GPUs than ranks here.
    """
    wanted = range(local_size) if gpus is None else gpus
    has_all = _gpus() > max(wanted)
    if device == "cuda" and not has_all:
        ranks = f"{local_size} rank{'s' if local_size > 1 else ''}"
        raise ConfigError(
            f"{CALL}: --device cuda: {ranks} here, but {_gpus()} GPUs; each needs one"
        )
    # NCCL refuses two ranks on one GPU.
    if device == "cpu" or not has_all:
        return torch.device("cpu")
    return torch.device("cuda", wanted[local_index])


def _be_spawned(
    index: int,
    stop: StopRequest,
    function: Callable[..., Any],
    args: tuple[object, ...],
    devices: Sequence[torch.device],
    rendezvous: str,
) -> Any:
    rank = Rank(index, len(devices), devices[index], stop)
    return _meet(function, args, rank, rendezvous, len(devices))


def _meet(
    function: Callable[..., Any],
    args: tuple[object, ...],
    rank: Rank,
    rendezvous: str,
    local_size: int,
) -> Any:
    """Be one rank: meet the others, call the function, part."""
    is_gpu = rank.device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(rank.device)
    elif local_size > 1:  # they share the cores: more threads each would only wait for one another
        torch.set_num_threads(1)
    if rank.world_size == 1:
        return function(rank, *args)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        init_method=rendezvous,
        rank=rank.index,
        world_size=rank.world_size,
    )
    result = _with_control(function, args, rank)
    # Not after an error: it would wait for peers that have gone.
    dist.destroy_process_group()
    return result


def _with_control(function: Callable[..., Any], args: tuple[object, ...], rank: Rank) -> Any:
    return function(replace(rank, control=dist.new_group(backend="gloo")), *args)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
