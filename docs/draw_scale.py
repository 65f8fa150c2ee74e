"""Draw docs/scale.png and print the tables of docs/scale.md: cost against the number of ranks.

Reads what `python benchmarks/bench_exchange.py --save` and `bench_batch_shuffle.py --save` wrote.

python docs/draw_scale.py
"""

import json
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from nccl_model import NCCL, PUBLIC
from palette import INK, colour, drawing
from scale_model import (
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
NODE = "regroup in a node"
BANDS = ("SyncBatchNorm", "batch_shuffle", "regroup")  # the others lie upon them
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


class Modelled(NamedTuple):
    """A key encoder's forward pass: its messages, bytes received, and milliseconds."""

    messages: int
    size: float
    graph: float
    eager: float


def modelled(world: int, way: str) -> Modelled:
    if way == NODE:  # every node by itself
        world, way = min(world, NCCL(True).node), "regroup"
    calls = key_encoder(way, world)
    times = [1e3 * NCCL(graph).seconds(calls, world) for graph in (True, False)]
    return Modelled(len(calls), sum(received(c, world) for c in calls), *times)


def print_modelled() -> None:
    worlds = (8, 64, 256, 1024)
    head = " | ".join(f"W = {world}" for world in worlds)
    print(f"\nResNet-50 key encoder, {len(RESNET50)} layers, forward: bytes received per rank\n")
    print(f"| | messages | {head} |\n|---|---|{'---|' * len(worlds)}")
    for way in (*WAYS, NODE):
        cells = [modelled(world, way) for world in worlds]
        counts = sorted({cell.messages for cell in cells})
        shown = [" or ".join(map(str, counts)), *(amount(cell.size) for cell in cells)]
        print(f"| {way} | {' | '.join(shown)} |")
    print("\nModel: milliseconds in a CUDA graph / eager\n")
    print(f"| | {head} |\n|---|{'---|' * len(worlds)}")
    for way in (*WAYS, NODE):
        cells = [modelled(world, way) for world in worlds]
        shown = [f"{duration(cell.graph)} / {duration(cell.eager)}" for cell in cells]
        print(f"| {way} | {' | '.join(shown)} |")
    print("\nFirst messages to new peers, once in a run, by the model:")
    for way, peers in (("swap", 2), ("regroup", 14), (NODE, 7), ("batch_shuffle", 1023)):
        print(f"  {way}: {peers} peers, {peers * NCCL(True).connection:.1f} s")


def print_public() -> None:
    """What others have measured, beside the model: a row for each table of theirs."""
    print("\n| measured by | on | bytes | microseconds | model over measured |")
    print("|---|---|---|---|---|")
    same = attrgetter("source", "what", "graph", "unlike")
    for (source, what, graph, unlike), group in groupby(PUBLIC, same):
        points = list(group)
        owner, number = source.split("#")
        sizes = span([amount(point.call.size) for point in points])
        times = span([f"{point.microseconds:.1f}" for point in points])
        ratios = span([f"{point.ratio:.2f}" for point in sorted(points, key=attrgetter("ratio"))])
        why = f": {unlike}" if unlike else ""
        link = f"[{source}](https://github.com/{owner}/issues/{number})"
        how = "graph" if graph else "eager"
        print(f"| {link} | {what}, {how} | {sizes} | {times} | {ratios}{why} |")


def span(texts: list[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


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


def draw_received(axes: Axes) -> None:
    for way in WAYS:
        # The seed's bytes are SyncBatchNorm's: both colours must be seen.
        over: dict[str, Any] = {"linestyle": "--", "zorder": 3} if way == "seed" else {}
        sizes = [modelled(world, way).size / 1e6 for world in WORLDS]
        axes.plot(WORLDS, sizes, color=colour(way), **over)
    axes.set_title("by formula\nkey encoder, received")
    axes.set_ylabel("MB per step")


def draw_modelled(axes: Axes) -> None:
    """Bands as wide as tests/test_nccl_model.py lets the model be off, around graph and eager."""
    for way in (*BANDS, NODE):
        worlds = [world for world in WORLDS if way != NODE or world >= NCCL(True).node]
        cells = [modelled(world, way) for world in worlds]
        edges = [cell.graph / 2 for cell in cells], [2 * cell.eager for cell in cells]
        if way == NODE:
            for edge in edges:
                axes.plot(worlds, edge, color=colour("regroup"), linestyle=":", linewidth=1)
            text = "in a node"
            axes.text(worlds[-1], 0.9 * edges[1][-1], text, color=INK, size=7, ha="right", va="top")
            continue
        axes.fill_between(worlds, *edges, color=colour(way), alpha=0.3, linewidth=0)
        for edge in edges:
            axes.plot(worlds, edge, color=colour(way), linewidth=1)
    axes.set_title("model, not measured\nkey encoder on H100s")
    axes.set_ylabel("ms per step")


def main() -> None:
    record = load("exchange")
    record["rows"] = rows_of_today(record)
    rows, samples = rows_measured(record["rows"]), samples_measured(load("batch_shuffle"))
    # Bytes show in whole samples only.
    gloo = fit(rows + list(samples.values()), record["cores"])
    print_measured(record)
    print_fit(rows, samples, gloo, record["cores"])
    print_modelled()
    print_public()

    with drawing("scale.png", 3.2) as figure:
        left, middle, right = figure.subplots(1, 3)
        draw_measured(left, record, gloo)
        draw_received(middle)
        draw_modelled(right)
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
