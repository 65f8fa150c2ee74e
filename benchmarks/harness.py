"""Times peers and ours in one run: interleaved, as ratios, with their spread and where they ran."""

import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shuffle_batchnorm.moco.checkpoint import write_atomically
from shuffle_batchnorm.moco.journal import processor
from shuffle_batchnorm.moco.ranks.launch import Rank

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BRIEF = 3  # rounds of a slow contestant


def bind(rank: Rank) -> None:
    """Bind a rank, with all its threads, to a core of its own, as mpirun does; on the CPU only.

    Unbound, two ranks may share a core for a while, and what one of them computes the other waits
    for: Python's share of a step then counts twice or not, by luck. Not for bare collectives of
    microseconds, whose threads then wait for the scheduler now and then, for 4 ms.
    """
    if rank.device.type == "cpu" and _have_a_core_each(rank.world_size):
        core = sorted(os.sched_getaffinity(0))[rank.index]
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def _have_a_core_each(ranks: int) -> bool:
    can_be_bound = hasattr(os, "sched_setaffinity")
    return ranks > 1 and can_be_bound and ranks <= len(os.sched_getaffinity(0))


class Timing(NamedTuple):
    """Seconds of one contestant, and its ratio to the first one, round by round."""

    median: float
    p20: float
    p80: float
    ratio: float
    ratio_p20: float
    ratio_p80: float


class Spread(NamedTuple):
    """Median and 20 and 80 percent points."""

    median: float
    p20: float
    p80: float


class Laps(NamedTuple):
    """Seconds of each stage of one contestant, by round, and of the host's part in all of them."""

    stages: list[list[float]]
    host: list[float]


class Stopwatch:
    """Cuts a run into stages: by the CPU's clock, or by the GPU's own while the host runs ahead."""

    # 5 ms in which the host gets ahead, so that a GPU's time has no gaps between its kernels.
    HEAD_START = 10_000_000  # cycles

    def __init__(self, device: str) -> None:
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda._sleep(self.HEAD_START)
        self.lap()

    def lap(self) -> None:
        """End a stage."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        self._times.append(time.perf_counter())

    def read(self) -> tuple[list[float], float]:
        """Seconds of every stage, and of the host's work for all of them."""
        host = self._times[-1] - self._times[0]
        if self._cuda:
            torch.cuda.synchronize()
            pairs = zip(self._events[:-1], self._events[1:], strict=True)
            return [begun.elapsed_time(ended) / 1e3 for begun, ended in pairs], host
        return [b - a for a, b in zip(self._times[:-1], self._times[1:], strict=True)], host


Staged = Callable[[Callable[[], None]], object]  # is handed `lap`, to be called after each stage


def one_stage(run: Callable[[], object], lap: Callable[[], None]) -> None:
    """Make a `Staged` of what has no stages: ``partial(one_stage, run)``."""
    run()
    lap()


def laps_of(
    contestants: Mapping[str, Staged],
    device: str,
    seconds: float,
    least: int,
    most: int,
    slow: Container[str] = (),
) -> dict[str, Laps]:
    """Time the stages of each contestant once per round, for so many seconds or rounds.

    Those that are slow run in the first `BRIEF` rounds only: they would take most of the time.
    """
    for run in contestants.values():
        run(lambda: None)
    laps: dict[str, Laps] = {name: Laps([], []) for name in contestants}
    for number in rounds_within(seconds, least, most):
        for name, run in _order(number, contestants):
            if name in slow and number >= BRIEF:
                continue
            if dist.is_initialized():
                dist.barrier()  # so that no contestant waits for a rank that the last one held up
            stopwatch = Stopwatch(device)
            run(stopwatch.lap)
            stages, host = stopwatch.read()
            laps[name].stages.append(stages)
            laps[name].host.append(host)
    return laps


def _order(number: int, contestants: Mapping[str, Staged]) -> list[tuple[str, Staged]]:
    """Give each round another order, the same on all ranks.

    What ran before leaves caches and memory in its state; no contestant shall always follow the
    same one.
    """
    return random.Random(number).sample(list(contestants.items()), len(contestants))


def rounds_within(seconds: float, least: int, most: int) -> Iterator[int]:
    """Count rounds until the time is used up, but `least`; ranks take as many as the first one."""
    begun = time.perf_counter()
    for number in range(most):
        over = number >= least and time.perf_counter() - begun > seconds
        if dist.is_initialized():
            told = [over]
            dist.broadcast_object_list(told, src=0)
            over = told[0]
        if over:
            return
        yield number


def spread(values: list[float]) -> Spread:
    points = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values
    return Spread(statistics.median(values), points[0], points[-1])


def ratios(mine: list[float], others: list[float]) -> Spread:
    """One contestant's time over another's, round by round."""
    return spread([a / b for a, b in zip(mine, others, strict=True)])


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time each contestant once per round; the first is the one that others are compared with.

    A round is short, so that the machine is as busy for one as for the other.
    """
    seconds = seconds_of(contestants, rounds)
    peer = next(iter(seconds.values()))
    return {name: _timing(times, peer) for name, times in seconds.items()}


def seconds_of(
    contestants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Return what each contestant took in each round."""
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timing(times: list[float], peer: list[float]) -> Timing:
    return Timing(*spread(times), *ratios(times, peer))


def save(
    name: str,
    rows: list[dict[str, Any]],
    *,
    on_ranks: bool = False,
    on_gpu: bool | None = None,
    folder: Path | None = None,
    **more: Any,
) -> Path:
    """Write the rows, and more, with what is needed to judge them; return the file.

    Args:
        name: of the file.
        rows: the results.
        on_ranks: each of several ranks measured, which have one thread each on the CPU.
        on_gpu: where; by default on a GPU if there is one.
        folder: for the file, by default `RESULTS`.
        **more: further entries of the file.
    """
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {"benchmark": name, **_circumstances(on_ranks, on_gpu), **more, "rows": rows}
    lines = (f" {json.dumps(key)}: {_text(value)}" for key, value in record.items())
    # A benchmark may be killed while it writes; what it had before stays.
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path


def _text(value: object) -> str:
    """JSON with a row of a table in a line, and as many digits as a measurement has."""
    short = json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    if not isinstance(short, list):
        return json.dumps(short)
    return "[\n  " + ",\n  ".join(map(json.dumps, short)) + "\n ]"


def _circumstances(on_ranks: bool, on_gpu: bool | None) -> dict[str, Any]:
    if on_gpu is None:
        on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": 1 if on_ranks and not on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": version("triton") if on_gpu and find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit() -> str:
    """The commit of the code that ran; results and documents may have changed since."""
    head = _git("rev-parse", "--short", "HEAD")
    # A copy without history is told its commit.
    if not head:
        return os.environ.get("COMMIT", "unknown")
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return f"{head}-dirty" if changed else head


def _git(*words: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
