"""Draw docs/layer_speed.png and docs/step_speed.png from what `make bench` has saved.

python docs/draw_benchmarks.py
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
COLOURS = {
    "local": "#8a8f98",
    "sync": "#4f9a55",
    "regroup": "#3b76af",
    "swap": "#cc4433",
    "batch-shuffle": "#b08a2e",
    "split-BN view": "#6f4fa0",
    "naive torch": "#222222",
}
PLAIN = "nn.BatchNorm2d"
Record = dict[str, Any]


def saved(name: str) -> Record | None:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        print(f"benchmarks/results/{name}.json is missing: make bench")
        return None
    record: Record = json.loads(path.read_text())
    return record


def look(name: str) -> Record:
    """Colour by mode; hollow marks for one group, full ones for several."""
    mode, *rest = name.split(", ")
    hollow = "groups=1" in rest or mode == PLAIN
    colour = COLOURS.get(mode, "#222222")
    return {"color": colour, "markerfacecolor": "white" if hollow else colour}


def draw_layers(axes: Axes, record: Record, title: str) -> None:
    """Per shape the ratio of forward and backward to plain batch norm's, with its spread."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in record["rows"]))
    names = [name for name in dict.fromkeys(row["name"] for row in record["rows"]) if name != PLAIN]
    for number, name in enumerate(names):
        ratios = [row["ratios"][PLAIN]["both"] for row in record["rows"] if row["name"] == name]
        medians = [median for median, _, _ in ratios]
        low = [max(0.0, median - p20) for median, p20, _ in ratios]
        high = [max(0.0, p80 - median) for median, _, p80 in ratios]
        # Side by side, in the order of the legend.
        places = [k + 0.7 * (number / max(1, len(names) - 1) - 0.5) for k in range(len(shapes))]
        axes.errorbar(
            places,
            medians,
            (low, high),
            label=name,
            fmt="o",
            markersize=4,
            linewidth=1,
            **look(name),
        )
    for edge in range(1, len(shapes)):
        axes.axvline(edge - 0.5, color="#e3e5e8", linewidth=0.6)
    labels = [f"{channels}\n{height}×{width}" for _, channels, height, width in shapes]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set(title=title, yscale="log", xlim=(-0.5, len(shapes) - 0.5))
    axes.yaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20, 50]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(1, color="black", linewidth=1)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_steps(axes: Axes, rows: list[Record], title: str) -> None:
    """A bar per kind of batch norm: the ratio of a step's time to the first one's."""
    medians, low, high = zip(*(row["ratio"] for row in rows), strict=True)
    errors = (
        [max(0.0, median - p20) for median, p20 in zip(medians, low, strict=True)],
        [max(0.0, p80 - median) for median, p80 in zip(medians, high, strict=True)],
    )
    colours = [COLOURS.get(row["bn"], "#d5d8dc") for row in rows]
    axes.barh(range(len(rows)), medians, xerr=errors, color=colours, height=0.6)
    axes.set_yticks(range(len(rows)), [row["bn"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    seconds = rows[0]["seconds"][0]
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=f"time / {rows[0]['bn']}'s, {1e3 * seconds:.0f} ms a step")


def finish(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(Path(__file__).with_name(name), dpi=120)


def layer_figure() -> Figure | None:
    kinds = {"eager": saved("layer"), "compiled": saved("layer_compiled")}
    found = {how: record for how, record in kinds.items() if record is not None}
    if not found:
        return None
    figure = Figure(figsize=(13, 4.6 * len(found)), facecolor="white", layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (how, record) in zip(panels, found.items(), strict=True):
        batch, threads = record["rows"][0]["shape"][0], record["threads"]
        draw_layers(axes, record, f"{how}, batch {batch}, {record['device']}, {threads} threads")
        axes.set_ylabel(f"forward + backward / {PLAIN}'s")
    panels[-1].set_xlabel("channels and pixels of ResNet-50's layers")
    return figure


def step_figure() -> Figure | None:
    names = ("step", "step_compiled")
    records = [record for name in names if (record := saved(name)) is not None]
    panels: dict[str, list[Record]] = {}
    for record in records:
        for row in record["rows"]:
            how = "compiled" if row["compiled"] else "eager"
            ranks = "one rank" if row["ranks"] == 1 else f"{row['ranks']} ranks"
            batch = f"{ranks}, {row['images'][0]} images each, groups={row['groups']}"
            title = f"{row['step']} step of {row['network']}, {how}\n{batch}"
            panels.setdefault(title, []).append(row)
    if not panels:
        return None
    high = (len(panels) + 1) // 2
    figure = Figure(figsize=(12, 2.9 * high), facecolor="white", layout="constrained")
    grid = figure.subplots(high, 2, squeeze=False).flat
    for axes, (title, rows) in zip(grid, panels.items(), strict=False):
        draw_steps(axes, rows, title)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_axis_off()
    return figure


def main() -> None:
    for name, figure in {
        "layer_speed.png": layer_figure(),
        "step_speed.png": step_figure(),
    }.items():
        if figure is not None:
            finish(figure, name)


if __name__ == "__main__":
    main()
