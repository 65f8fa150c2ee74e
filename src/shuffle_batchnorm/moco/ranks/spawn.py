"""Processes, one per rank, that start together and end together, whatever happens to one."""

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

# Seconds that peers of a failed rank have to report, before they are killed.
_GRACE = 2.0
# Seconds that ranks have to save and leave after the first of them has.
_LEAVE = 60.0
# Seconds after which a second signal is another one.
_TWICE = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RankError(RuntimeError):
    """The process of a rank died without an exception."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did; `signum` is the signal's number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(signum, message)
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


@dataclass
class StopRequest:
    """The signal that asked this process to stop, or 0."""

    signum: int = 0


@contextmanager
def handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT inside a block; only a main thread can, others change nothing."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in _SIGNALS if is_main}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold SIGTERM and SIGINT back until the end of a block, and in processes started in it.

    A terminal's Ctrl-C goes to all processes, also to those that still import torch.
    """
    start_tracker()  # later, starting it would let signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_tracker() -> None:
    """Start multiprocessing's process that tidies up, one that does so without a word.

    Ranks that end after an error leave it the semaphores of their loaders, and it would warn.
    """
    sys.warnoptions.append("ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove("ignore:resource_tracker")


@contextmanager
def noting_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT, for the training loop to read between two steps.

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

    with handling_signals(note):
        yield stop


class _Outcome(NamedTuple):
    """What one rank returned or raised."""

    result: Any
    error: BaseException | None
    ended: float  # on the monotonic clock, which the processes of a machine share


def spawn_ranks(
    function: Callable[..., Any], size: int, *args: object, graceful: bool = False
) -> Any:
    """Call ``function(index, stop, *args)`` in a process per rank; return what rank 0 returned.

    SIGTERM and SIGINT end the ranks. No process outlives this call, or this process, even if it is
    killed.

    Args:
        function: at the top level of a module, since it is pickled by reference.
        size: W, the number of ranks.
        *args: handed to every rank.
        graceful: a first signal is only noted in the ranks' `StopRequest`; they stop by themselves.

    Raises:
        Stopped: a signal asked for it.
        RankError: the process of a rank died.
        Exception: what a rank raised, the first in time, with its traceback as a note.
    """
    # spawn, because a forked child would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    asked: list[int] = []  # signals that this process got
    outcomes: dict[int, _Outcome] = {}

    def tell() -> None:
        for process in processes:
            process.terminate() if graceful and len(asked) == 1 else process.kill()

    def forward(signum: int, _frame: object) -> None:
        asked.append(signum)
        tell()

    try:
        with handling_signals(forward):
            with holding_signals():
                for index in range(size):
                    mine, theirs = context.Pipe(duplex=False)
                    work = (theirs, function, index, args)
                    process = context.Process(target=_be_rank, args=work)
                    process.start()
                    processes.append(process)
                    pipes.append(mine)
                    theirs.close()
            if asked:
                tell()  # also those that were not there yet
            _collect(outcomes, processes, pipes, asked)
    finally:
        for index, process in enumerate(processes):
            process.join(_GRACE if index in outcomes else 0)
            process.kill()
            process.join()
    return _judge(outcomes, asked)


def _collect(
    outcomes: dict[int, _Outcome],
    processes: Sequence[SpawnProcess],
    pipes: Sequence[Connection],
    asked: Sequence[int],
) -> None:
    """Wait for the ranks; once one has failed, only as long as its peers should need."""
    deadline: float | None = None
    while len(outcomes) < len(pipes):
        waiting = [pipe for index, pipe in enumerate(pipes) if index not in outcomes]
        ready = wait(waiting, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for index, pipe in enumerate(pipes):
            if pipe in ready:
                try:
                    outcomes[index] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    outcomes[index] = _death(index, processes[index])
        errors = [outcome.error for outcome in outcomes.values() if outcome.error is not None]
        if errors and deadline is None:
            leaving = asked or any(isinstance(error, Stopped) for error in errors)
            deadline = time.monotonic() + (_LEAVE if leaving else _GRACE)


def _death(index: int, process: SpawnProcess) -> _Outcome:
    process.join(_GRACE)
    code = process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    error = RankError(f"the process of rank {index} died: {how}")
    return _Outcome(None, error, time.monotonic())


def _judge(outcomes: dict[int, _Outcome], asked: Sequence[int]) -> Any:
    """Return rank 0's result, or raise what made the ranks fail."""
    failed = sorted((o for o in outcomes.values() if o.error is not None), key=lambda o: o.ended)
    errors = [outcome.error for outcome in failed if outcome.error is not None]
    if errors and asked:
        name = signal.Signals(asked[0]).name
        said = [str(error) for error in errors if isinstance(error, Stopped)]
        # The ranks got SIGTERM, whatever came here.
        message = said[0].replace(signal.SIGTERM.name, name) if said else f"stopped by {name}"
        raise Stopped(asked[0], message)
    if errors:
        first = errors[0]
        deaths = [error for error in errors if isinstance(error, RankError)]
        # What a rank says of a peer that died is no more than an echo.
        is_echo = type(first) is RuntimeError or isinstance(first, dist.DistError)
        raise deaths[0] if deaths and is_echo else first
    stop_late(*asked[:1])
    return outcomes[0].result


def stop_late(signum: int = 0) -> None:
    """Heed a signal that came after the last time that the run looked for one.

    Without it a signal during the measurements at the end would be forgotten, and a comparison
    would go on with its next run.

    Raises:
        Stopped: `signum` is not 0.
    """
    if signum:
        name = signal.Signals(signum).name
        raise Stopped(signum, f"stopped by {name}, which came when the run was at its end")


def leave(code: int) -> NoReturn:
    """End the process of a rank, without shutting Python down.

    A thread of gloo that drops its last message would abort the process then.
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


# What follows runs in the processes of the ranks.


def _be_rank(
    pipe: Connection, function: Callable[..., Any], index: int, args: tuple[object, ...]
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stop = StopRequest()

    def note(signum: int, _frame: object) -> None:
        stop.signum = signum

    signal.signal(signal.SIGTERM, note)
    # Of a terminal's Ctrl-C the parent tells.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        outcome = _Outcome(function(index, stop, *args), None, time.monotonic())
    except BaseException as error:  # the parent must learn of SystemExit too
        outcome = _Outcome(None, _portable(error, index), time.monotonic())
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


def _portable(error: BaseException, index: int) -> BaseException:
    """Return the error, or a stand-in if it can't be built again, with its traceback as a note."""
    where = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"on rank {index}:\n{where}")
    return error
