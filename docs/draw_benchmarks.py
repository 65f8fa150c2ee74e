"""Draw docs/layer_speed.png and docs/step_speed.png from what `make bench` has saved.

Prints the table of layers of docs/speed.md.

python docs/draw_benchmarks.py
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import INK, colour, drawing

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PLAIN = "nn.BatchNorm2d"
MODES = ("local", "swap", "regroup")
LAYERS = {"contiguous": "layer", "channels_last": "layer_channels_last"}
COMPILED = {"contiguous": "layer_compiled", "channels_last": "layer_channels_last_compiled"}
Record = dict[str, Any]


def saved(name: str) -> Record | None:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        print(f"benchmarks/results/{name}.json is missing: make bench")
        return None
    record: Record = json.loads(path.read_text())
    return record


def ratio(record: Record, name: str, peer: str = PLAIN) -> Record | None:
    """Forward and backward of one contestant over a peer's: mean and largest of all shapes."""
    rows = record["summary"]
    found = (row["both"] for row in rows if (row["name"], row["peer"]) == (name, peer))
    return next(found, None)


def draw_layers(axes: Axes, record: Record) -> None:
    """A bar per mode and number of groups; a line from it to the slowest shape."""
    names = [f"{mode}, groups={groups}" for mode in MODES for groups in (1, 8)]
    for row, name in enumerate(names):
        both = ratio(record, name)
        if both is None:
            continue
        mean, largest = both["geometric_mean"], both["largest"]
        opacity, ink = (0.45, INK) if name.endswith("=1") else (1.0, "white")
        axes.barh(row, mean, color=colour(name.partition(",")[0]), alpha=opacity, height=0.72)
        axes.plot([mean, largest], [row, row], color=INK, linewidth=1)
        axes.plot(largest, row, "|", color=INK, markersize=8)
        axes.text(0.04, row, f"{mean:.2f}", color=ink, va="center", weight="bold")
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_layer_figure(figure: Figure, found: dict[str, Record]) -> None:
    panels = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (layout, record) in zip(panels, found.items(), strict=True):
        draw_layers(axes, record)
        axes.set_title(layout)
    panels[0].invert_yaxis()
    panels[0].set_xlim(left=0)
    record = next(iter(found.values()))
    batch = record["rows"][0]["shape"][0]
    figure.supxlabel(
        f"forward + backward / {PLAIN}'s; bar: mean of ResNet-50's shapes, tick: slowest shape\n"
        f"eager, float32, batch {batch}, {record['device']}, {record['threads']} threads",
        fontsize=8.5,
    )


def print_layers() -> None:
    eager = {layout: saved(name) for layout, name in LAYERS.items()}
    compiled = {layout: saved(name) for layout, name in COMPILED.items()}
    print("| layer | " + " | ".join(f"{layout}, eager | compiled" for layout in eager) + " |")
    print("|---|" + "---|---|" * len(eager))
    for mode in MODES:
        cells = []
        for layout in eager:
            pairs = ((eager[layout], "", PLAIN), (compiled[layout], ", compiled", PLAIN))
            for record, how, peer in pairs:
                cells.append(cell(record, mode, how, peer))
        print(f"| `{mode}` | {' | '.join(cells)} |")
    for layout, record in compiled.items():
        both = record and ratio(record, f"{PLAIN}, compiled")
        if both:
            print(f"{PLAIN}, compiled / eager, {layout}: {both['geometric_mean']:.2f}")


def cell(record: Record | None, mode: str, how: str, peer: str) -> str:
    """Mean over shapes for groups=1 / 8, and the largest of both in brackets."""
    found = [record and ratio(record, f"{mode}, groups={groups}{how}", peer) for groups in (1, 8)]
    both = [row for row in found if row]
    if not both:
        return ""
    means = " / ".join(f"{row['geometric_mean']:.2f}" for row in both)
    return f"{means} ({max(row['largest'] for row in both):.2f})"


def draw_steps(axes: Axes, rows: list[Record], title: str) -> None:
    """A bar per kind of batch norm: the ratio of a step's time to the first one's."""
    medians, low, high = zip(*(row["ratio"] for row in rows), strict=True)
    errors = (
        [max(0.0, median - p20) for median, p20 in zip(medians, low, strict=True)],
        [max(0.0, p80 - median) for median, p80 in zip(medians, high, strict=True)],
    )
    colours = [colour(row["bn"]) for row in rows]
    axes.barh(range(len(rows)), medians, xerr=errors, color=colours, ecolor=INK, height=0.72)
    axes.set_yticks(range(len(rows)), [row["bn"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", fontsize=8.5)
    axes.set_xlabel(f"time / {rows[0]['bn']}'s, {1e3 * rows[0]['seconds'][0]:.0f} ms a step")


def step_panels() -> dict[str, list[Record]]:
    panels: dict[str, list[Record]] = {}
    for name in ("step", "step_compiled"):
        record = saved(name)
        for row in () if record is None else record["rows"]:
            how = "compiled" if row["compiled"] else "eager"
            ranks = "one rank" if row["ranks"] == 1 else f"{row['ranks']} ranks"
            title = (
                f"{row['step']} step of {row['network']}, {how}\n{ranks}, {row['images'][0]} "
                f"images each, groups={row['groups']}"
            )
            panels.setdefault(title, []).append(row)
    return panels


def main() -> None:
    found = {layout: record for layout, name in LAYERS.items() if (record := saved(name))}
    if found:
        with drawing("layer_speed.png", 2.9) as figure:
            draw_layer_figure(figure, found)
        print_layers()
    panels = step_panels()
    if panels:
        heights = [len(rows) + 3.5 for rows in panels.values()]
        with drawing("step_speed.png", 0.22 * sum(heights)) as figure:
            column = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
            for axes, (title, rows) in zip(column, panels.items(), strict=True):
                draw_steps(axes, rows, title)


if __name__ == "__main__":
    main()
