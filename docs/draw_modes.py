"""Draw docs/modes.png: whose statistics normalise whom in the four modes, from `mixing_matrix`.

python docs/draw_modes.py
"""

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch, Rectangle
from palette import GREY, INK, LIGHT, colour, drawing
from torch import Tensor

from shuffle_batchnorm import mixing_matrix, spectral_radius

RANKS, BATCH = 4, 8
MODES = {
    "local": "each rank's own",
    "sync": "those of all samples",
    "swap": "the next rank's",
    "regroup": "those of new groups",
}
GROUPS = tuple(colour(name) for name in ("regroup", "batch-shuffle", "sync", "seed"))


def normalisers(matrix: Tensor) -> list[frozenset[int]]:
    """The sets of samples whose statistics are used together, by their first sample."""
    found = {frozenset(row.nonzero().flatten().tolist()) for row in matrix}
    return sorted(found, key=min)


def paint(normaliser: int, count: int) -> str:
    return GREY if count == 1 else GROUPS[normaliser]


def draw_samples(axes: Axes, matrix: Tensor) -> None:
    """One box per rank: a sample's left half is the group it is in, its right the one it uses."""
    known = normalisers(matrix)
    for sample in range(RANKS * BATCH):
        rank, position = divmod(sample, BATCH)
        joins = next(k for k, members in enumerate(known) if sample in members)
        uses = known.index(frozenset(matrix[sample].nonzero().flatten().tolist()))
        top = -1.5 * rank
        for half, normaliser in ((0.0, joins), (0.42, uses)):
            tint = paint(normaliser, len(known))
            axes.add_patch(Rectangle((position + half, top), 0.42, 0.84, color=tint, linewidth=0))
        axes.add_patch(
            Rectangle((position, top), 0.84, 0.84, fill=False, edgecolor=INK, linewidth=0.6)
        )
    for rank in range(RANKS):
        box = FancyBboxPatch((-0.12, -1.5 * rank - 0.12), BATCH + 0.08, 1.08, fill=False)
        box.set(boxstyle="round,pad=0.02,rounding_size=0.12", edgecolor="#b8bdc4", linewidth=0.8)
        axes.add_patch(box)
    axes.set(xlim=(-0.4, BATCH + 0.2), ylim=(-1.5 * RANKS + 1.2, 1.15), aspect="equal")
    axes.axis("off")


def draw_matrix(axes: Axes, matrix: Tensor) -> None:
    """Row p has the colour of p's normaliser in the columns of the samples that are in it."""
    known = normalisers(matrix)
    cells = matrix.gt(0).long()
    for p, row in enumerate(cells):
        cells[p] = row * (1 + known.index(frozenset(row.nonzero().flatten().tolist())))
    colours = ListedColormap(["white", *(paint(k, len(known)) for k in range(len(known)))])
    axes.imshow(cells.numpy(), cmap=colours, vmin=0, vmax=len(known), interpolation="nearest")
    edges = [BATCH * k - 0.5 for k in range(1, RANKS)]
    axes.hlines(edges, -0.5, RANKS * BATCH - 0.5, color=LIGHT, linewidth=0.8)
    axes.vlines(edges, -0.5, RANKS * BATCH - 0.5, color=LIGHT, linewidth=0.8)
    middles = [BATCH * k + (BATCH - 1) / 2 for k in range(RANKS)]
    axes.set_xticks(middles, [f"{k}" for k in range(RANKS)])
    axes.set_yticks(middles, [f"{k}" for k in range(RANKS)])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_xlabel(f"spectral radius {spectral_radius(matrix):.2f}")


def main() -> None:
    with drawing("modes.png", 4.5) as figure:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(0.95, 1.15))[:, 0]
        upper, lower = above.subplots(1, len(MODES)), below.subplots(1, len(MODES))
        for column, (mode, words) in enumerate(MODES.items()):
            matrix = mixing_matrix(mode, world_size=RANKS, groups=1, batch_size=BATCH)
            draw_samples(upper[column], matrix)
            upper[column].set_title(mode, fontsize=11, pad=16)
            upper[column].text(
                0.5, 1.02, words, transform=upper[column].transAxes, ha="center", va="bottom"
            )
            draw_matrix(lower[column], matrix)
        for rank in range(RANKS):
            upper[0].text(-0.5, -1.5 * rank + 0.42, f"rank {rank}", ha="right", va="center")
        lower[0].set_ylabel("samples normalised, by rank")
        above.supxlabel(
            "A square is a sample. Left half: the group whose statistics it is part of. "
            "Right half: the group that normalises it.",
            fontsize=8.5,
        )
        below.supxlabel("samples whose statistics are used, by rank", fontsize=8.5)


if __name__ == "__main__":
    main()
