"""Run a function on every rank of a real process group, from inside a test.

`run_on_ranks(2, function)` calls `function` in two processes that share a gloo group and hands back
what each rank returned. The processes are started once per world size and kept for the session: a
start costs seconds, a call about a millisecond.

A call leaves nothing behind for the next one: after a rank has raised, the ranks may disagree on
which collective comes next, so the pool moves to a new group before it is used again; after a rank
has died or hung, its pool is killed and the next call starts another.
"""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

from shuffle_batchnorm.comm import collectives

Result = TypeVar("Result")

TIMEOUT = 60.0  # s, for one call
START_TIMEOUT = 120.0  # s, for processes to start and meet: 16 imports of torch take a while
# Shorter than TIMEOUT: a rank that waits for a peer in vain gets gloo's error and tells where.
GROUP_TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True)
class _Outcome:
    """What one rank made of a call."""

    result: Any = None
    error: BaseException | None = None
    where: str = ""
    failed_at: float = 0.0  # on the monotonic clock, which the processes of a machine share


class _RemoteTraceback(Exception):
    """The traceback in another process, as the cause of the exception that came from there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class RankPool:
    """One process per rank of a group of `world_size`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.alive = True
        self._in_step = False
        self._groups = 0
        # A file in a folder of our own: unlike a port, nobody else can have taken it.
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
        # A pool of one process each, since only a pool of one says which process gets a call.
        # spawn, because a forked child would inherit torch's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        self._executors = [
            ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_prepare)
            for _ in range(world_size)
        ]

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        timeout: float,
    ) -> list[_Outcome]:
        """Call the function on every rank; kill the pool when a rank dies or takes too long."""
        # Pickled here and not by the executor: that one sends a tensor as a handle on shared
        # memory, which is void once its sender is killed, and refuses one that has a graph.
        payload = pickle.dumps((function, args, kwargs))
        if not self._in_step:
            self._meet()
        outcomes = self._gather([payload] * self.world_size, _name(function), timeout)
        self._in_step = all(outcome.error is None for outcome in outcomes)
        return outcomes

    def kill(self) -> None:
        """End the processes, whatever they are doing."""
        self.alive = False
        for executor in self._executors:
            # TODO: executor.kill_workers(), a public name, once Python 3.14 is the oldest.
            for process in list((executor._processes or {}).values()):
                process.kill()
        for executor in self._executors:
            executor.shutdown(wait=True, cancel_futures=True)
        self._folder.cleanup()

    def _meet(self) -> None:
        self._groups += 1
        rendezvous = Path(self._folder.name, f"group-{self._groups}").as_uri()
        payloads = [
            pickle.dumps((_join_group, (rendezvous, rank, self.world_size), {}))
            for rank in range(self.world_size)
        ]
        _raise_first_error(self._gather(payloads, "joining the process group", START_TIMEOUT))

    def _gather(self, payloads: list[bytes], name: str, timeout: float) -> list[_Outcome]:
        futures = [
            _submit(executor, payload)
            for executor, payload in zip(self._executors, payloads, strict=True)
        ]
        try:
            # Only a death is an exception here: an error of the function comes as an _Outcome.
            wait(futures, timeout, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C, or the test's own time limit: the ranks are still at it
            self.kill()
            raise
        finished = {rank: future for rank, future in enumerate(futures) if future.done()}
        dead = [rank for rank, future in finished.items() if future.exception() is not None]
        busy = [rank for rank in range(self.world_size) if rank not in finished]
        outcomes = [
            pickle.loads(future.result()) for rank, future in finished.items() if rank not in dead
        ]
        if not (dead or busy):
            return outcomes
        self.kill()
        stopped = f"{name} on {self.world_size} ranks"
        failure: Exception
        if dead:
            survivors = f"; ranks {busy} were still busy" if busy else ""
            failure = RuntimeError(f"{stopped}: the process of ranks {dead} died{survivors}")
        else:
            failure = TimeoutError(f"{stopped}: ranks {busy} still busy after {timeout:g} s")
        _add_notes(failure, outcomes)
        raise failure


_pools: dict[int, RankPool] = {}


def run_on_ranks(
    world_size: int,
    function: Callable[..., Result],
    *args: object,
    timeout: float = TIMEOUT,
    fresh: bool = False,
    **kwargs: object,
) -> list[Result]:
    """Call `function(*args, **kwargs)` on every rank; its results, in the order of the ranks.

    Args:
        world_size: how many ranks.
        function: named at the top level of a module, since it is pickled by reference. It finds its
            rank with `dist.get_rank()` and its random state seeded with 0.
        *args: handed to every rank.
        timeout: seconds after which the ranks are killed.
        fresh: use new processes and end them afterwards, for what would spoil them for others.
        **kwargs: handed to every rank.

    Raises:
        Exception: the one that was raised first, with those of all ranks as notes.
        TimeoutError: some ranks are still busy after `timeout`.
        RuntimeError: the process of some rank died.
    """
    outcomes = _call(world_size, function, args, kwargs, timeout, fresh)
    _raise_first_error(outcomes)
    return [outcome.result for outcome in outcomes]


def outcomes_on_ranks(
    world_size: int,
    function: Callable[..., Result],
    *args: object,
    timeout: float = TIMEOUT,
    fresh: bool = False,
    **kwargs: object,
) -> list[Result | BaseException]:
    """As `run_on_ranks`, with a rank's exception in the place of its result."""
    outcomes = _call(world_size, function, args, kwargs, timeout, fresh)
    return [outcome.result if outcome.error is None else _error_of(outcome) for outcome in outcomes]


def restart(world_size: int) -> None:
    """End the processes kept for this world size; the next call starts new ones."""
    pool = _pools.pop(world_size, None)
    if pool is not None:
        pool.kill()


def stop_all() -> None:
    """End every process of every pool."""
    for world_size in list(_pools):
        restart(world_size)


def _call(
    world_size: int,
    function: Callable[..., Any],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    timeout: float,
    fresh: bool,
) -> list[_Outcome]:
    if fresh:
        pool = RankPool(world_size)
        try:
            return pool.call(function, args, kwargs, timeout)
        finally:
            pool.kill()
    if world_size not in _pools or not _pools[world_size].alive:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size].call(function, args, kwargs, timeout)


def _submit(executor: ProcessPoolExecutor, payload: bytes) -> Future[bytes]:
    try:
        return executor.submit(_on_rank, payload)
    except BrokenExecutor as death:  # it died since the last call
        future: Future[bytes] = Future()
        future.set_exception(death)
        return future


def _raise_first_error(outcomes: list[_Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        # First in time: what comes later is often a peer that waited for the one that failed.
        error = _error_of(min(failed, key=lambda outcome: outcome.failed_at))
        _add_notes(error, outcomes)
        raise error


def _error_of(outcome: _Outcome) -> BaseException:
    assert outcome.error is not None
    outcome.error.__cause__ = _RemoteTraceback(outcome.where)
    return outcome.error


def _add_notes(failure: BaseException, outcomes: list[_Outcome]) -> None:
    for outcome in outcomes:
        if outcome.error is not None:
            failure.add_note(outcome.where.splitlines()[0])


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


# What follows runs in the processes of the ranks.


def new_group() -> Any:
    """A group of all ranks that has agreed on nothing yet, and that a test may spoil."""
    # What is left under way in it holds up the end of all groups until this time limit.
    return dist.new_group(list(range(dist.get_world_size())), timeout=GROUP_TIMEOUT / 2)


@contextmanager
def impatient() -> Iterator[None]:
    """Let a waiting rank look around every 0.2 s in place of 2."""
    with mock.patch.object(collectives, "_PATIENCE", timedelta(milliseconds=200)):
        yield


def _prepare() -> None:
    torch.set_num_threads(1)  # the ranks of a test share few cores
    faulthandler.enable()
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Leave no process behind when pytest is killed and can't end its own."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _join_group(rendezvous: str, rank: int, world_size: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT
    )


def _on_rank(payload: bytes) -> bytes:
    try:
        # What a test sees must not depend on the tests before it: neither what it draws nor what
        # they ignored.
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # A few ranks are what tests have.
            warnings.filterwarnings("ignore", ".* mode 'regroup' leaves 1/")
            function, args, kwargs = pickle.loads(payload)
            return pickle.dumps(_Outcome(result=function(*args, **kwargs)))
    except BaseException as error:  # pytest.fail and SystemExit are not Exceptions
        rank = dist.get_rank() if dist.is_initialized() else "?"
        summary = "".join(traceback.format_exception_only(error)).strip()
        where = f"rank {rank}: {summary}\n{traceback.format_exc()}"
        return pickle.dumps(_Outcome(None, _portable(error, summary), where, time.monotonic()))


def _portable(error: BaseException, summary: str) -> BaseException:
    """The error, or a stand-in when it can't be built again from its arguments."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(summary)
    return error
