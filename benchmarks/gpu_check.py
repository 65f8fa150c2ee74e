"""Tests and measures a GPU, each part in a process and within a time limit of its own.

    python benchmarks/gpu_check.py test bench [--out FOLDER] [--only PART ...] [--tiny]

What `make gpu-test`, `gpu-bench` and `gpu-check` run, with any Python that has torch and pytest.
test: the tests marked `gpu` or `gpu_too`, file by file, side by side, within 90 s. bench: the parts
of bench_gpu.py, one after another and the most telling first, within 240 s. A part that takes
longer than its limit is killed, and the next one goes on. FOLDER gets the log of each part, what a
benchmark has measured by then, and what became of all parts: test.json and bench.json. Exit status
1 if a part did not pass. `--patience 3` gives everything three times as long; `--tiny` tries the
program on any device, with small tensors and Triton's interpreter.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import harness
import torch
from harness import RESULTS, ROOT
from targets import Target, print_targets

TOTAL = {"test": 90.0, "bench": 240.0}  # s
TEST = 85.0  # s, for a file
# By worth: where time runs out, the last ones are missing.
BENCHMARKS = {
    "host": 40.0,
    "step": 50.0,
    "layer": 75.0,
    "kernels": 40.0,
    "profile": 25.0,
    "ranks": 40.0,
    "compiled": 150.0,
    "memory": 25.0,
    "graphs": 20.0,
}
CASES = "(gpu or gpu_too) and not spare"
Row = dict[str, Any]


class Part(NamedTuple):
    """A command, and the seconds that it may take."""

    name: str
    command: list[str]
    limit: float


class Running(NamedTuple):
    """A part that has begun."""

    part: Part
    process: subprocess.Popen[str]
    log: TextIO
    begun: float
    limit: float


def test_parts() -> list[Part]:
    """One for each file with tests for a GPU: to collect others may take the extra `train`."""
    folder = ROOT / "tests"
    options = ["-m", CASES, "--durations=10", "--tb=short", "-p", "no:cacheprovider"]
    pytest = [sys.executable, "-m", "pytest", *options]
    return [
        Part("-".join(path.relative_to(folder).with_suffix("").parts), [*pytest, str(path)], TEST)
        for path in sorted(folder.rglob("test_*.py"))
        if re.search(r"mark\.gpu", path.read_text())
    ]


def bench_parts(out: Path, tiny: bool) -> list[Part]:
    options = ["--out", str(out), *(["--tiny"] if tiny else [])]
    program = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py")]
    return [Part(name, [*program, name, *options], limit) for name, limit in BENCHMARKS.items()]


def run(parts: list[Part], kind: str, out: Path, total: float, jobs: int) -> list[Row]:
    """Run the parts, so many at once; write what became of them after each, and return it."""
    end = time.monotonic() + total
    waiting, running, rows = list(parts), list[Running](), list[Row]()
    try:
        while waiting or running:
            before = len(rows)
            while waiting and len(running) < jobs:
                part = waiting.pop(0)
                for suffix in (".json", ".log"):  # what this run doesn't measure shall not be there
                    (out / f"{part.name}{suffix}").unlink(missing_ok=True)
                limit = min(part.limit, end - time.monotonic())
                if limit > 0:
                    running.append(_begin(part, out, limit))
                else:
                    rows.append(_row(part, "NOT RUN", None, 0.0, 0.0, "no time was left"))
            time.sleep(0.05)
            for one in list(running):
                took = time.monotonic() - one.begun
                if one.process.poll() is not None or took > one.limit:
                    running.remove(one)
                    rows.append(_finish(one, took))
            if len(rows) > before:
                harness.save(kind, rows, folder=out)
    finally:
        for one in running:
            _kill(one)
    return rows


def _begin(part: Part, out: Path, limit: float) -> Running:
    log = (out / f"{part.name}.log").open("w+")
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    return Running(part, process, log, time.monotonic(), limit)


def _finish(one: Running, took: float) -> Row:
    status = one.process.poll()
    _kill(one)
    one.log.seek(0)
    lines = one.log.read().splitlines()
    one.log.close()
    outcome = "OVERRAN" if status is None else "FAILED" if status else "passed"
    last = next((line.strip("= ") for line in reversed(lines) if line.strip("= ")), "")
    row = _row(one.part, outcome, status, took, one.limit, last)
    if outcome != "passed":
        print("".join(f"    {line}\n" for line in lines[-30:]), flush=True)
    return row


def _row(part: Part, outcome: str, status: int | None, took: float, limit: float, last: str) -> Row:
    print(f"{outcome:8}{took:6.1f} of {limit:.0f} s  {part.name}: {last}", flush=True)
    return {
        "part": part.name,
        "outcome": outcome,
        "status": status,
        "seconds": took,
        "limit": limit,
        "last_line": last,
    }


def _kill(one: Running) -> None:
    """End a part, with all processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGKILL)
    # What hangs in the driver of the GPU may not even die.
    with suppress(subprocess.TimeoutExpired):
        one.process.wait(5)


def _targets(parts: list[Part], out: Path) -> list[Target]:
    """What the benchmarks have measured, against their targets."""
    paths = (out / f"{part.name}.json" for part in parts)
    records = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [
        Target(**{key: row[key] for key in Target._fields})
        for record in records
        for row in record["targets"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("kinds", nargs="+", choices=TOTAL)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="PART", help="no other part")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="of tests")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limits")
    parser.add_argument("--tiny", action="store_true", help="on any device")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        print(f"gpu-check: {sys.executable} sees no CUDA device: NOTHING WAS CHECKED")
        return 1
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in arguments.kinds:
        parts = test_parts() if kind == "test" else bench_parts(out, arguments.tiny)
        parts = [
            part._replace(limit=arguments.patience * part.limit)
            for part in parts
            if not arguments.only or part.name in arguments.only
        ]
        jobs = arguments.jobs if kind == "test" else 1
        rows += run(parts, kind, out, arguments.patience * TOTAL[kind], jobs)
        if kind == "bench":
            print_targets(_targets(parts, out))
    bad = [row["part"] for row in rows if row["outcome"] != "passed"]
    print(f"\n{len(rows) - len(bad)} parts passed" + (f", NOT: {', '.join(bad)}" if bad else ""))
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the parts
    sys.exit(main())
