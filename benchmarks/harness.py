"""Times peers and ours in one run: interleaved, as ratios, with their spread and where they ran."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Seconds of one contestant, and its ratio to the first one, round by round."""

    median: float
    p20: float
    p80: float
    ratio: float
    ratio_p20: float
    ratio_p80: float


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
    ratios = [mine / other for mine, other in zip(times, peer, strict=True)]
    return Timing(*spread(times), *spread(ratios))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and 20 and 80 percent points."""
    points = statistics.quantiles(values, n=5)
    return statistics.median(values), points[0], points[-1]


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows with what is needed to judge them; return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"benchmark": name, **_circumstances(), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _circumstances() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
