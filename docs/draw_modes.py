"""Draw docs/modes.png: whose statistics normalise whom in the four modes, from `mixing_matrix`.

python docs/draw_modes.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from shuffle_batchnorm import mixing_matrix, spectral_radius

RANKS = 4
BATCH = 8
MODES = {
    "local": "each rank's own statistics",
    "sync": "everyone's statistics",
    "swap": "the next rank's statistics",
    "regroup": "statistics of a dealt group",
}
COLOURS = ("#3b76af", "#e08a2e", "#4f9a55", "#b6519c")
EVERYONE = "#8a8f98"
INK = "#22262b"


def pools(matrix: Tensor) -> list[frozenset[int]]:
    """The sets of samples whose statistics are used together, by their first sample."""
    found = {frozenset(row.nonzero().flatten().tolist()) for row in matrix}
    return sorted(found, key=min)


def colour(pool: int, count: int) -> str:
    return EVERYONE if count == 1 else COLOURS[pool]


def draw_samples(axes: Axes, matrix: Tensor) -> None:
    """One box per rank; each sample's left half gives to a pool, its right half takes from one."""
    known = pools(matrix)
    for sample in range(RANKS * BATCH):
        rank, place = divmod(sample, BATCH)
        gives = next(k for k, pool in enumerate(known) if sample in pool)
        takes = known.index(frozenset(matrix[sample].nonzero().flatten().tolist()))
        top = -1.5 * rank
        for half, pool in ((0.0, gives), (0.42, takes)):
            paint = colour(pool, len(known))
            axes.add_patch(Rectangle((place + half, top), 0.42, 0.84, color=paint, linewidth=0))
        axes.add_patch(Rectangle((place, top), 0.84, 0.84, fill=False, edgecolor=INK, linewidth=1))
        axes.plot([place + 0.42] * 2, [top, top + 0.84], color="white", linewidth=1)
    for rank in range(RANKS):
        box = FancyBboxPatch((-0.12, -1.5 * rank - 0.12), BATCH + 0.08, 1.08, fill=False)
        box.set(boxstyle="round,pad=0.02,rounding_size=0.12", edgecolor="#b8bdc4", linewidth=1)
        axes.add_patch(box)
    axes.set(xlim=(-0.4, BATCH + 0.2), ylim=(-1.5 * RANKS + 1.2, 1.15), aspect="equal")
    axes.axis("off")


def draw_matrix(axes: Axes, matrix: Tensor) -> None:
    """Row p has the colour of p's normaliser in the columns of the samples that it pools."""
    known = pools(matrix)
    cells = matrix.gt(0).long()
    for p, row in enumerate(cells):
        cells[p] = row * (1 + known.index(frozenset(row.nonzero().flatten().tolist())))
    palette = ListedColormap(["white", *(colour(k, len(known)) for k in range(len(known)))])
    axes.imshow(cells.numpy(), cmap=palette, vmin=0, vmax=len(known), interpolation="nearest")
    lines = [BATCH * k - 0.5 for k in range(1, RANKS)]
    axes.hlines(lines, -0.5, RANKS * BATCH - 0.5, color="#d5d8dc", linewidth=0.8)
    axes.vlines(lines, -0.5, RANKS * BATCH - 0.5, color="#d5d8dc", linewidth=0.8)
    middles = [BATCH * k + (BATCH - 1) / 2 for k in range(RANKS)]
    axes.set_xticks(middles, [f"{k}" for k in range(RANKS)])
    axes.set_yticks(middles, [f"{k}" for k in range(RANKS)])
    axes.tick_params(length=0)
    radius = f"{spectral_radius(matrix):.2f}"
    axes.set_xlabel(
        f"samples that give statistics, by rank\nspectral radius of $I-M$: {radius}", fontsize=9.5
    )


def main() -> None:
    figure = Figure(figsize=(12, 7.0), facecolor="white")
    grid = figure.subplots(
        2, len(MODES),
        gridspec_kw=dict(
            height_ratios=(1, 1.2), left=0.075, right=0.985, top=0.92, bottom=0.10, hspace=0.32,
            wspace=0.16,
        ),
    )  # fmt: skip
    for column, (mode, words) in enumerate(MODES.items()):
        matrix = mixing_matrix(mode, world_size=RANKS, groups=1, batch_size=BATCH)
        above, below = grid[0, column], grid[1, column]
        draw_samples(above, matrix)
        above.set_title(mode, fontsize=15, fontweight="bold", pad=22)
        above.text(0.5, 1.02, words, transform=above.transAxes, ha="center", fontsize=10.5)
        draw_matrix(below, matrix)
    for rank in range(RANKS):
        grid[0, 0].text(-0.45, -1.5 * rank + 0.42, f"rank {rank}", ha="right", va="center")
    grid[1, 0].set_ylabel("sample that is normalised, by rank")
    figure.text(
        0.5, 0.535,
        "A square is a sample. Left half: the pool that its values enter. "
        "Right half: the pool that normalises it.",
        ha="center", fontsize=11,
    )  # fmt: skip
    figure.savefig(Path(__file__).with_name("modes.png"), dpi=120)


if __name__ == "__main__":
    main()
