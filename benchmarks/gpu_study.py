"""Trains a ResNet-18 with several --bn side by side on one GPU; says what leaks and what it learns.

    python benchmarks/gpu_study.py [--data-path FOLDER] [--bn BN ...] [--seeds SEED ...] [--tiny]

What `make gpu-study` runs, with any Python that has what `NEEDED` lists. Each run is the trainer's
own command, in a process with a time limit, all of them at once, within 8 minutes; its checkpoints
and its record are in RUNS/BN-seedK. OUT gets its log; study.json, what became of each; and
summary.json: all records in RUNS, of which a table is printed, with differences paired by seed. The
same command goes on with what was cut off and doesn't repeat what has ended, so other --bn or
--seeds are added by another call. Exit status 1 if a run did not end. `--tiny` tries the program on
any device, with digits.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_check
import harness
import torch
from gpu_check import Part
from harness import RESULTS, ROOT

TOTAL = 470.0  # s; what is left of 8 minutes is for the start and the table
# What the trainer imports, by the name that pip knows it by.
NEEDED = {
    "kornia": "kornia",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tyro": "tyro",
}
# Those of MoCo's notebook for CIFAR-10, which train a ResNet-18 (batch, learning rate, temperature,
# queue), with the groups of 8 of docs/comparison.md, for as many epochs as there is time.
SETTINGS = {
    "--network": "resnet18",
    "--epochs": "30",
    "--batch-size": "512",
    "--groups": "64",
    "--queue": "4096",
    "--lr": "0.06",
    "--temperature": "0.1",
    "--device": "cuda",
    "--precision": "bf16",
    "--eval-every": "10",
    "--save-every": "500",
}
TINY = {
    "--network": "small",
    "--epochs": "1",
    "--batch-size": "64",
    "--groups": "8",
    "--queue": "64",
    "--lr": "0.03",
    "--device": "cpu",
}
Record = dict[str, Any]


def missing() -> list[str]:
    """Return which packages pip has to install first."""
    return [package for name, package in NEEDED.items() if find_spec(name) is None]


def run_parts(arguments: argparse.Namespace, runs: Path) -> list[Part]:
    """Return the trainer's command for each `--bn` and seed, seed by seed."""
    flags = {"--dataset": arguments.dataset, **SETTINGS}
    if arguments.tiny:
        flags = {"--dataset": "digits", **TINY}
    if arguments.data_path is not None:
        flags["--data-path"] = str(arguments.data_path.resolve())
    if arguments.epochs is not None:
        flags["--epochs"] = str(arguments.epochs)
    switches = ["--channels-last", "--linear", "--resume", "--no-tensorboard"]
    shared = [*switches, *(word for flag in flags.items() for word in flag)]
    parts = []
    for seed in arguments.seeds:
        for bn in arguments.bn:
            name = f"{bn}-seed{seed}"
            own = ["--bn", bn, "--seed", str(seed), "--output", str(runs / name)]
            command = [sys.executable, "-m", "shuffle_batchnorm", "train", *own, *shared]
            parts.append(Part(name, command, arguments.patience * TOTAL))
    return parts


def read_records(runs: Path) -> list[Record]:
    """Return the records of all runs that have ended, of earlier calls too."""
    return [json.loads(path.read_text()) for path in sorted(runs.glob("*/record.json"))]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dataset", default="fashion-mnist", choices=("fashion-mnist", "cifar10"))
    parser.add_argument("--data-path", type=Path, metavar="FOLDER", help="as the trainer's")
    parser.add_argument("--bn", nargs="+", default=["local", "regroup"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", metavar="FOLDER")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu-study", metavar="FOLDER")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limit")
    parser.add_argument("--tiny", action="store_true", help="on any device")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        print(f"gpu-study: {sys.executable} sees no CUDA device: NOTHING WAS TRAINED")
        return 1
    if packages := missing():
        need = " ".join(packages)
        print(f"gpu-study: {sys.executable} lacks {need}: {sys.executable} -m pip install {need}")
        return 1
    # Not at the top: scipy may be missing.
    from shuffle_batchnorm.moco.comparison.tables import markdown_table

    out, runs = arguments.out.resolve(), arguments.runs.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = run_parts(arguments, runs)
    rows = gpu_check.run(parts, "study", out, arguments.patience * TOTAL, jobs=len(parts))
    records = read_records(runs)
    if records:
        print(f"\n{markdown_table(records)}", flush=True)
    commands = {part.name: part.command[1:] for part in parts}
    harness.save("summary", records, folder=out, commands=commands)
    return 0 if rows and all(row["outcome"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the runs
    sys.exit(main())
