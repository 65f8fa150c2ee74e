"""Draw docs/scale.png and print the tables of docs/scale.md: cost against the number of ranks.

Reads what `python benchmarks/bench_exchange.py --save` and `bench_batch_shuffle.py --save` wrote.

python docs/draw_scale.py
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from palette import colour, drawing
from scale_model import (
    NCCL,
    RESNET50,
    Gloo,
    Point,
    fit,
    key_encoder,
    layer,
    misses,
    received,
    rows_measured,
    rows_of_today,
    samples_measured,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CHANNELS = 512
WORLDS = [2**k for k in range(1, 11)]
WAYS = ("seed", "SyncBatchNorm", "MoCo's shuffle", "batch_shuffle", "regroup", "swap")
LAYERS = ("seed", "SyncBatchNorm", "regroup", "swap")
Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def find(record: dict[str, Any], way: str, world: int, direction: str = "forward") -> Row | None:
    """The row of one contestant at C = 512; None if its exchange was another one then."""
    key = way, world, CHANNELS, direction
    names = "name", "world_size", "channels", "direction"
    found = (row for row in record["rows"] if tuple(row[name] for name in names) == key)
    return next(found, None)


def worlds_of(record: dict[str, Any]) -> list[int]:
    return sorted({row["world_size"] for row in record["rows"]})


def milliseconds(row: Row | None) -> str:
    return "" if row is None else f"{1e3 * row['median']:.1f}"


def times(row: Row | None, peer: str) -> str:
    if row is None:
        return ""
    return "{:.1f} ({:.1f} to {:.1f})".format(*row["times_faster_than"][peer])


def print_measured(record: dict[str, Any]) -> None:
    print(f"One layer of C = {CHANNELS}, forward, milliseconds, and times faster:\n")
    print("| W | seed | SyncBatchNorm | `swap` | than the seed | `regroup` | than SyncBatchNorm |")
    print("|---|---|---|---|---|---|---|")
    for world in worlds_of(record):
        rows = {way: find(record, way, world) for way in LAYERS}
        cells = [
            *(milliseconds(rows[way]) for way in ("seed", "SyncBatchNorm", "swap")),
            times(rows["swap"], "seed"),
            milliseconds(rows["regroup"]),
            times(rows["regroup"], "SyncBatchNorm"),
        ]
        print(f"| {world} | {' | '.join(cells)} |")
    print("\nBackward:\n")
    print("| W | SyncBatchNorm | `swap` | times faster | `regroup` | times faster |")
    print("|---|---|---|---|---|---|")
    for world in worlds_of(record):
        rows = {way: find(record, way, world, "backward") for way in LAYERS[1:]}
        cells = [milliseconds(rows["SyncBatchNorm"])]
        for way in ("swap", "regroup"):
            cells += [milliseconds(rows[way]), times(rows[way], "SyncBatchNorm")]
        print(f"| {world} | {' | '.join(cells)} |")
    print("\nThe row of `swap` with nothing around it, milliseconds:\n")
    print("| W | `swap` | bare all_to_all_single | bare isend and irecv |")
    print("|---|---|---|---|")
    for world in worlds_of(record):
        cells = [milliseconds(find(record, way, world)) for way in ("swap", "all_to_all", "isend")]
        print(f"| {world} | {' | '.join(cells)} |")


def print_fit(
    rows: list[Point], samples: dict[tuple[str, int], Point], gloo: Gloo, cores: int
) -> None:
    print("\n| of the gloo model | microseconds |\n|---|---|")
    names = ("a hop", "a message", "a kilobyte")
    for name, value in zip(names, (gloo.hop, gloo.message, 1e3 * gloo.byte), strict=True):
        print(f"| {name} | {1e6 * value:.1f} |")
    points = rows + list(samples.values())
    off = misses(points, lambda calls, world: gloo.seconds(calls, world, cores))
    tenth = len(off) // 10
    print(f"\n{len(off)} points; model over measured: median {median(off):.2f}, ", end="")
    print(f"eight in ten between {off[tenth]:.2f} and {off[-1 - tenth]:.2f}")

    print("\nWhole samples, milliseconds:\n")
    print("| W | MoCo's functions | model | `batch_shuffle` | model |\n|---|---|---|---|---|")
    for world in sorted({world for _, world in samples}):
        cells = []
        for name in ("MoCo", "ours"):
            point = samples[name, world]
            cells += [point.seconds, gloo.seconds(point.calls, world, cores)]
        print(f"| {world} | {' | '.join(f'{1e3 * cell:.1f}' for cell in cells)} |")


def amount(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= unit:
            return f"{size / unit:.{0 if size >= 10 * unit else 1}f} {name}"
    return f"{size:.0f} B"


def duration(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2f}"


def modelled(world: int, way: str) -> tuple[int, float, float]:
    """Messages, bytes received and milliseconds of a key encoder's forward pass."""
    calls = key_encoder(way, world)
    return len(calls), sum(received(c, world) for c in calls), 1e3 * NCCL().seconds(calls, world)


def print_modelled() -> None:
    worlds = (8, 64, 256, 1024)
    print(f"\nModel: ResNet-50 key encoder, {len(RESNET50)} layers, forward\n")
    print(f"| | messages | {' | '.join(f'W = {world}' for world in worlds)} |")
    print(f"|---|---|{'---|' * len(worlds)}")
    for way in WAYS:
        cells = [modelled(world, way) for world in worlds]
        shown = [f"{amount(size)}, {duration(ms)} ms" for _, size, ms in cells]
        counts = sorted({cell[0] for cell in cells})
        print(f"| {way} | {' or '.join(map(str, counts))} | {' | '.join(shown)} |")
    print("\nFirst messages to new peers, once in a run, by the model:")
    for way, peers in (("swap", 2), ("regroup", 14), ("batch_shuffle", 1023)):
        print(f"  {way}: {peers} peers, {peers * NCCL().connection:.1f} s")


def draw_measured(axes: Axes, record: dict[str, Any], gloo: Gloo) -> None:
    worlds, cores = worlds_of(record), record["cores"]
    for way, aside in zip(LAYERS, (1.0, 0.94, 1.06, 1.0), strict=True):  # bars side by side
        found = [(world, row) for world in worlds if (row := find(record, way, world))]
        middle = [1e3 * row["median"] for _, row in found]
        spread = [
            [1e3 * (row["median"] - row["p20"]) for _, row in found],
            [1e3 * (row["p80"] - row["median"]) for _, row in found],
        ]
        positions = [aside * world for world, _ in found]
        axes.errorbar(positions, middle, spread, fmt="o", color=colour(way), markersize=4)
        line = [1e3 * gloo.seconds(layer(way, w, CHANNELS), w, cores) for w in worlds]
        axes.plot(worlds, line, color=colour(way))
    axes.set_title(f"measured\none layer, C = {CHANNELS}")
    axes.set_ylabel("ms")


def draw_modelled(received_axes: Axes, time_axes: Axes) -> None:
    for way in WAYS:
        cells, tint = [modelled(world, way) for world in WORLDS], colour(way)
        # The seed's bytes are SyncBatchNorm's: both colours must be seen.
        over: dict[str, Any] = {"linestyle": "--", "zorder": 3} if way == "seed" else {}
        received_axes.plot(WORLDS, [size / 1e6 for _, size, _ in cells], color=tint, **over)
        time_axes.plot(WORLDS, [ms for *_, ms in cells], color=tint)
    received_axes.set_title("by formula\nkey encoder, received")
    received_axes.set_ylabel("MB per step")
    time_axes.set_title("model, not measured\nkey encoder on H100s")
    time_axes.set_ylabel("ms per step")


def main() -> None:
    record = load("exchange")
    record["rows"] = rows_of_today(record)
    rows, samples = rows_measured(record["rows"]), samples_measured(load("batch_shuffle"))
    # Bytes show in whole samples only.
    gloo = fit(rows + list(samples.values()), record["cores"])
    print_measured(record)
    print_fit(rows, samples, gloo, record["cores"])
    print_modelled()

    with drawing("scale.png", 3.2) as figure:
        left, middle, right = figure.subplots(1, 3)
        draw_measured(left, record, gloo)
        draw_modelled(middle, right)
        for ax, worlds in ((left, worlds_of(record)), (middle, WORLDS), (right, WORLDS)):
            ax.set(xscale="log", yscale="log", xlabel="W, ranks")
            shown = worlds if len(worlds) < 6 else worlds[::3]
            ax.set_xticks(shown, [f"{world:,}" for world in shown], minor=False)
            ax.set_xticks([], [], minor=True)
        handles = [left.plot([], [], color=colour(way), label=way)[0] for way in WAYS]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=6, fontsize=7.5, handlelength=1.2,
            columnspacing=1.0,
        )  # fmt: skip


if __name__ == "__main__":
    main()
