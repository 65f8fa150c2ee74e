"""What the library set out to be as fast as, and whether the saved results are.

    python benchmarks/targets.py

Prints a line per target that a file in benchmarks/results has a number for; `make bench` ends with
it. Those for a GPU are in bench_gpu.py, which measures and judges in one run.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
from peers import IN_STEP, MODES, PLAIN

Row = dict[str, Any]


class Target(NamedTuple):
    """A number, what it should be, and where it came from."""

    name: str
    value: float
    limit: float
    where: str
    is_least: bool = False  # the limit is the least that will do; else the most

    @property
    def is_met(self) -> bool:
        return self.value >= self.limit if self.is_least else self.value <= self.limit


def print_targets(targets: list[Target]) -> None:
    print(f"\n{'target':62}  measured    limit")
    for target in targets:
        sign = ">=" if target.is_least else "<="
        verdict = "met   " if target.is_met else "MISSED"
        print(
            f"{target.name:62}{target.value:10.3f}  {sign} {target.limit:.2f}  {verdict}  "
            f"{target.where}"
        )


def slowest(summary: list[Row], peer: str, key: str = "geometric_mean") -> Row:
    """Of the library's layers, the one whose ratio to a peer is largest."""
    ours = [row for row in summary if row["peer"] == peer and row["name"].startswith(MODES)]
    return max(ours, key=lambda row: float(row["both"][key]))


def layer_targets(summary: list[Row], memory: list[Row]) -> list[Target]:
    peak = max(memory, key=lambda row: float(row["ratio"]))
    return [
        *mean_targets(summary, "contiguous"),
        Target(f"peak memory of a step / {PLAIN}", peak["ratio"], 1.02, peak["name"]),
    ]


def mean_targets(summary: list[Row], layout: str) -> list[Target]:
    mean = slowest(summary, PLAIN)
    value = mean["both"]["geometric_mean"]
    return [Target(f"{layout}, forward + backward / {PLAIN}, mean", value, 1.35, mean["name"])]


def host_targets(rows: list[Row]) -> list[Target]:
    """Of stand-ins for a GPU's kernels: the Python, the look-ups and the allocations of a step."""
    return [
        Target(f"host time / {PLAIN}, stand-ins", row["ratio"], 2.0, row["name"])
        for row in rows
        if row["name"] in ("local", "swap", "regroup")
    ]


def compiled_targets(summary: list[Row], layout: str = "") -> list[Target]:
    limits = {PLAIN: 1.0, f"{PLAIN}, compiled": 1.1}
    worst = {peer: slowest(summary, peer) for peer in limits}
    return [
        Target(
            f"{layout}compiled / {peer}", row["both"]["geometric_mean"], limits[peer], row["name"]
        )
        for peer, row in worst.items()
    ]


def step_targets(rows: list[Row]) -> list[Target]:
    steps = {row["bn"]: row for row in rows if row["step"] == "supervised" and row["compiled"]}
    floor = f", {IN_STEP}: {steps[IN_STEP]['ratio'][0]:.2f}" if IN_STEP in steps else ""
    return [
        Target(
            f"compiled step, all layers {bn} / {PLAIN}", row["ratio"][0], 1.10,
            f"{row['network']}, {row['ranks']} ranks{floor}",
        )
        for bn, row in steps.items()
        if bn in ("swap", "regroup")
    ]  # fmt: skip


def exchange_targets(rows: list[Row]) -> list[Target]:
    limits = {("swap", 2): 2, ("swap", 4): 4, ("swap", 8): 6, ("regroup", 8): 1}
    peers = {"swap": "seed", "regroup": "SyncBatchNorm"}
    return [
        Target(
            f"{row['name']}, times faster than {peers[row['name']]}",
            row["times_faster_than"][peers[row["name"]]][0],
            limits[row["name"], row["world_size"]],
            f"one layer of C = 512 forward, {row['world_size']} ranks",
            is_least=True,
        )
        for row in rows
        if row["channels"] == 512
        and row["direction"] == "forward"
        and (row["name"], row["world_size"]) in limits
    ]


def shuffle_targets(rows: list[Row]) -> list[Target]:
    limits = {2: 2.5, 4: 8.0, 8: 20.0}
    bare = {row["world_size"]: row["ratio"] for row in rows if row["name"] == "bare"}
    return [
        Target(
            "batch_shuffle, times faster than MoCo's", 1 / row["ratio"], limits[world_size],
            f"{world_size} ranks, bare all_to_all: {1 / bare[world_size]:.1f}", is_least=True,
        )
        for row in rows
        if row["name"] == "ours" and (world_size := row["world_size"]) in limits
    ]  # fmt: skip


def saved(name: str) -> Row | None:
    """What a benchmark has saved."""
    path = harness.RESULTS / f"{name}.json"
    found: Row | None = json.loads(path.read_text()) if path.exists() else None
    return found


def main() -> None:
    readers: dict[str, Callable[[Row], list[Target]]] = {
        "host": lambda record: host_targets(record["rows"]),
        "layer": lambda record: layer_targets(record["summary"], record["memory"]),
        "layer_channels_last": lambda record: mean_targets(record["summary"], "channels-last"),
        "layer_compiled": lambda record: compiled_targets(record["summary"]),
        "layer_channels_last_compiled": lambda record: compiled_targets(
            record["summary"], "channels-last, "
        ),
        "step_compiled": lambda record: step_targets(record["rows"]),
        "exchange": lambda record: exchange_targets(record["rows"]),
        "batch_shuffle": lambda record: shuffle_targets(record["rows"]),
    }
    records = {name: saved(name) for name in readers}
    print_targets([
        target
        for name, record in records.items()
        if record is not None
        for target in readers[name](record)
    ])  # fmt: skip


if __name__ == "__main__":
    main()
