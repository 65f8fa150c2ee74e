"""Draw docs/scale.png and print the tables of docs/scale.md: cost against the number of ranks.

Reads what `python benchmarks/bench_exchange.py --save` and `bench_batch_shuffle.py --save` wrote.

python docs/draw_scale.py
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
    samples_measured,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CHANNELS = 512
WORLDS = [2**k for k in range(1, 11)]
WAYS = {
    "seed": "#cc4433",
    "SyncBatchNorm": "#4f9a55",
    "MoCo's shuffle": "#b6519c",
    "batch_shuffle": "#e08a2e",
    "regroup": "#3b76af",
    "swap": "#8a8f98",
}
LAYERS = ("seed", "SyncBatchNorm", "regroup", "swap")
Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def find(record: dict[str, Any], way: str, world: int, direction: str = "forward") -> Row:
    """The row of one contestant at C = 512."""
    return next(
        row
        for row in record["rows"]
        if (row["name"], row["world_size"], row["channels"], row["direction"])
        == (way, world, CHANNELS, direction)
    )


def worlds_of(record: dict[str, Any]) -> list[int]:
    return sorted({row["world_size"] for row in record["rows"]})


def milliseconds(row: Row) -> str:
    return f"{1e3 * row['median']:.1f}"


def times(row: Row, peer: str) -> str:
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


def on_paper(world: int, way: str) -> tuple[int, float, float]:
    """Messages, bytes received and milliseconds of a key encoder's forward pass."""
    calls = key_encoder(way, world)
    return len(calls), sum(received(c, world) for c in calls), 1e3 * NCCL().seconds(calls, world)


def print_paper() -> None:
    worlds = (8, 64, 256, 1024)
    print(f"\nOn paper: ResNet-50 key encoder, {len(RESNET50)} layers, forward\n")
    print(f"| | messages | {' | '.join(f'W = {world}' for world in worlds)} |")
    print(f"|---|---|{'---|' * len(worlds)}")
    for way in WAYS:
        cells = [on_paper(world, way) for world in worlds]
        shown = [f"{amount(size)}, {duration(ms)} ms" for _, size, ms in cells]
        counts = sorted({cell[0] for cell in cells})
        print(f"| {way} | {' or '.join(map(str, counts))} | {' | '.join(shown)} |")
    print("\nFirst messages to new peers, once in a run, on paper:")
    for way, peers in (("swap", 2), ("regroup", 14), ("batch_shuffle", 1023)):
        print(f"  {way}: {peers} peers, {peers * NCCL().connection:.1f} s")


def draw_measured(axes: Axes, record: dict[str, Any], gloo: Gloo) -> None:
    worlds, cores = worlds_of(record), record["cores"]
    for way, aside in zip(LAYERS, (1.0, 0.96, 1.04, 1.0), strict=True):  # bars side by side
        rows = [find(record, way, world) for world in worlds]
        middle = [1e3 * row["median"] for row in rows]
        spread = [
            [1e3 * (row["median"] - row["p20"]) for row in rows],
            [1e3 * (row["p80"] - row["median"]) for row in rows],
        ]
        places = [aside * world for world in worlds]
        axes.errorbar(places, middle, spread, fmt="o", color=WAYS[way], markersize=5, capsize=3)
        line = [1e3 * gloo.seconds(layer(way, w, CHANNELS), w, cores) for w in worlds]
        axes.plot(worlds, line, color=WAYS[way], linewidth=1.5)
    axes.set_title(f"measured: one layer, C = {CHANNELS}\ngloo on {cores} cores; lines: model")
    axes.set_ylabel("forward exchange, ms")


def draw_paper(received_axes: Axes, time_axes: Axes) -> None:
    for way, tint in WAYS.items():
        cells = [on_paper(world, way) for world in WORLDS]
        # The seed's bytes are SyncBatchNorm's: both colours must be seen.
        over: dict[str, Any] = {"linestyle": "--", "zorder": 3} if way == "seed" else {}
        received_axes.plot(WORLDS, [size / 1e6 for _, size, _ in cells], color=tint, lw=2, **over)
        time_axes.plot(WORLDS, [ms for *_, ms in cells], color=tint, linewidth=2)
    received_axes.set_title("by formula: ResNet-50 key encoder,\nbytes received per rank")
    received_axes.set_ylabel("MB per step")
    time_axes.set_title("on paper, not measured:\nResNet-50 key encoder, NCCL, H100")
    time_axes.set_ylabel("ms per step")


def main() -> None:
    record = load("exchange")
    rows, samples = rows_measured(record), samples_measured(load("batch_shuffle"))
    # Bytes show in whole samples only.
    gloo = fit(rows + list(samples.values()), record["cores"])
    print_measured(record)
    print_fit(rows, samples, gloo, record["cores"])
    print_paper()

    figure = Figure(figsize=(13, 4.8), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    left, middle, right = figure.subplots(1, 3)
    draw_measured(left, record, gloo)
    draw_paper(middle, right)
    for ax, worlds in ((left, worlds_of(record)), (middle, WORLDS), (right, WORLDS)):
        ax.set(xscale="log", yscale="log", xlabel="W, ranks")
        shown = worlds if len(worlds) < 6 else worlds[::3]
        ax.set_xticks(shown, [f"{world:,}" for world in shown], minor=False)
        ax.set_xticks([], [], minor=True)
        ax.grid(color="#e3e5e8", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [
        left.plot([], [], color=tint, linewidth=2, label=way)[0] for way, tint in WAYS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(Path(__file__).with_name("scale.png"), dpi=120)


if __name__ == "__main__":
    main()
