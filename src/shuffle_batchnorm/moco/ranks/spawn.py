"""Processes, one per rank, that are started together and end together, whatever happens to one."""

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from shuffle_batchnorm.moco.config import CALL

# Seconds that peers of a failed rank have to tell their side, before they are killed.
_GRACE = 2.0
# Seconds that ranks have to save and leave after the first of them has.
_LEAVE = 60.0
# Seconds after which a second signal is another one.
_TWICE = 2.0


class RankError(RuntimeError):
    """A rank died without a word."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did; `signum` is the signal's number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.signum, str(self))


@dataclass
class StopRequest:
    """The signal that asked this process to stop, or 0."""

    signum: int = 0


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT, for the training loop to see between two steps.

    A second signal ends the process at once, unless it is the echo of the first: a terminal and
    torchrun may both send one.
    """
    stop, first = StopRequest(), 0.0

    def note(signum: int, _frame: object) -> None:
        nonlocal first
        if not stop.signum:
            stop.signum, first = signum, time.monotonic()
        elif time.monotonic() - first > _TWICE:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may listen
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Outcome(NamedTuple):
    """What one rank made of its work."""

    result: Any
    error: BaseException | None
    where: str
    ended: float  # on the monotonic clock, which the processes of a machine share


class _Family:
    """The processes of all ranks, seen from the one that started them."""

    def __init__(self, graceful: bool) -> None:
        self.graceful = graceful
        self.processes: list[SpawnProcess] = []
        self.pipes: list[Connection] = []
        self.outcomes: dict[int, _Outcome] = {}
        self.died: list[int] = []  # in this order, before the others were killed
        self.asked: list[int] = []  # signals that this process got

    def start(self, function: Callable[..., Any], args: tuple[object, ...], size: int) -> None:
        # spawn, because a forked child would inherit torch's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            work = (theirs, function, rank, args)
            process = context.Process(target=_be_rank, args=work, name=f"rank {rank}")
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def forward(self, signum: int, _frame: object = None) -> None:
        """Ask all ranks to stop; end them if that isn't the first time."""
        self.asked.append(signum)
        for process in self.processes:
            if process.is_alive():
                is_first = self.graceful and len(self.asked) == 1
                process.terminate() if is_first else process.kill()

    def gather(self) -> None:
        """Wait for the ranks; once one has failed, only as long as its peers should need."""
        waiting = dict(enumerate(self.pipes))
        deadline: float | None = None
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait(list(waiting.values()), left)
            if not ready:
                return
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                self._hear(rank, waiting.pop(rank))
            errors = [o.error for o in self.outcomes.values() if o.error is not None]
            if deadline is None and (errors or self.died):
                patient = self.asked or any(isinstance(error, Stopped) for error in errors)
                deadline = time.monotonic() + (_LEAVE if patient else _GRACE)

    def _hear(self, rank: int, pipe: Connection) -> None:
        try:
            self.outcomes[rank] = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            self.died.append(rank)
        self.processes[rank].join(_GRACE)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def judge(self) -> Any:
        """Return rank 0's result, or raise what made the run fail."""
        errors = {rank: o for rank, o in self.outcomes.items() if o.error is not None}
        if self.asked and (errors or len(self.outcomes) < len(self.processes)):
            words = [str(o.error) for o in errors.values() if isinstance(o.error, Stopped)]
            # The ranks got SIGTERM, whatever came here.
            name = signal.Signals(self.asked[0]).name
            words = [word.replace(signal.SIGTERM.name, name) for word in words]
            raise Stopped(self.asked[0], words[0] if words else f"{CALL}: stopped by {name}")
        if errors:
            rank, first = min(errors.items(), key=lambda item: item[1].ended)
            # What a rank says of a peer that died is no more than an echo.
            if first.error is not None and not (self.died and _is_echo(first.error)):
                first.error.add_note(f"on rank {rank}:\n{first.where}")
                raise first.error
        if self.died:
            code = self.processes[self.died[0]].exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise RankError(f"{CALL}: the process of rank {self.died[0]} died: {how}")
        return self.outcomes[0].result


def spawn_ranks(
    function: Callable[..., Any], size: int, *args: object, graceful: bool = True
) -> Any:
    """Call ``function(rank, stop, *args)`` in a process per rank; return what rank 0 returned.

    SIGTERM and SIGINT are handed to the ranks, whose `StopRequest` notes them; a second signal
    ends them at once. No process outlives this call, or this process.

    Args:
        function: at the top level of a module, since it is pickled by reference.
        size: W, the number of ranks.
        *args: handed to every rank.
        graceful: let the ranks decide when to stop after a first signal; False ends them.

    Raises:
        Stopped: a signal asked for it.
        RankError: a rank died.
        Exception: what a rank raised, the first in time, with its traceback as a note.
    """
    family = _Family(graceful)
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    # A terminal's Ctrl-C goes to all processes: the children inherit that it is ignored, and hear
    # of it from here, once.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        family.start(function, args, size)
        for number in numbers:
            signal.signal(number, family.forward)
        family.gather()
    finally:
        family.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    return family.judge()


def leave(code: int) -> NoReturn:
    """End the process of a rank, without taking Python down.

    A thread of gloo that lets go of its last message would abort the process then.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python would
    atexit._run_exitfuncs()  # what other packages started, such as compiler processes, ends
    _end(code)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # nobody reads it any more: Python itself would end with this code
            code = code or 120
    os._exit(code)


def _is_echo(error: BaseException) -> bool:
    return type(error) is RuntimeError or isinstance(error, dist.DistError)


# What follows runs in the processes of the ranks.


def _be_rank(
    pipe: Connection, function: Callable[..., Any], rank: int, args: tuple[object, ...]
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stop = StopRequest()

    def note(signum: int, _frame: object) -> None:
        stop.signum = signum

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = _Outcome(function(rank, stop, *args), None, "", time.monotonic())
    except BaseException as error:  # SystemExit is news to the parent too
        where = traceback.format_exc()
        outcome = _Outcome(None, _portable(error), where, time.monotonic())
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    if outcome.error is not None:
        _end(1)  # a process group that lost a rank can't be shut down in order
    leave(0)


def _die_with_parent() -> None:
    """Leave no process behind when the parent is killed and can't end its own."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """Return the error, or a stand-in when it can't be built again from its arguments."""
    try:
        again: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return again
