"""What the library set out to be as fast as, and whether the saved results are.

    python benchmarks/targets.py

Prints a line per target that a file in benchmarks/results has a number for; `make bench` ends with
it. Those for a GPU are in bench_gpu.py, which measures and judges in one run.
"""

import json
from typing import Any, NamedTuple

import harness
from peers import MODES, PLAIN, SPLIT

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
    mean, largest = slowest(summary, PLAIN), slowest(summary, PLAIN, "largest")
    split = slowest(summary, SPLIT)
    name, peak = f"forward + backward / {PLAIN}", max(memory, key=lambda row: float(row["ratio"]))
    shape = "x".join(map(str, largest["both"]["largest_shape"]))
    return [
        Target(f"{name}, mean", mean["both"]["geometric_mean"], 1.10, mean["name"]),
        Target(f"{name}, largest", largest["both"]["largest"], 1.35, f"{largest['name']}, {shape}"),
        Target(
            f"forward + backward / {SPLIT}", split["both"]["geometric_mean"], 1.05, split["name"]
        ),
        Target(f"peak memory of a step / {PLAIN}", peak["ratio"], 1.02, peak["name"]),
    ]


def compiled_targets(summary: list[Row]) -> list[Target]:
    limits = {PLAIN: 1.0, f"{PLAIN}, compiled": 1.1}
    worst = {peer: slowest(summary, peer) for peer in limits}
    return [
        Target(f"compiled / {peer}", row["both"]["geometric_mean"], limits[peer], row["name"])
        for peer, row in worst.items()
    ]


def step_targets(rows: list[Row]) -> list[Target]:
    return [
        Target(
            f"compiled step, all layers {row['bn']} / {PLAIN}", row["ratio"][0], 1.10,
            f"{row['network']}, {row['ranks']} ranks",
        )
        for row in rows
        if row["step"] == "supervised" and row["compiled"] and row["bn"] in ("swap", "regroup")
    ]  # fmt: skip


def saved(name: str) -> Row | None:
    """What a benchmark has saved."""
    path = harness.RESULTS / f"{name}.json"
    found: Row | None = json.loads(path.read_text()) if path.exists() else None
    return found


def main() -> None:
    targets = []
    if (layer := saved("layer")) is not None:
        targets += layer_targets(layer["summary"], layer["memory"])
    if (compiled := saved("layer_compiled")) is not None:
        targets += compiled_targets(compiled["summary"])
    if (step := saved("step_compiled")) is not None:
        targets += step_targets(step["rows"])
    print_targets(targets)


if __name__ == "__main__":
    main()
