"""Draw docs/stability.png and print its table: how activations grow with depth in each mode.

Networks in train mode, float64, weights as initialised, one process: groups=8 virtual groups of 8
samples, 16 channels, 8×8 pixels, standard normal input; the median of nine seeds. The plain
network is convolution, batch norm and ReLU in a row; the residual one has two convolutions in a
block. A network's layers are drawn from the seed in order, so one of 10 layers is the beginning of
one of 50, and one run measures both.

python docs/draw_stability.py
"""

from statistics import median
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from palette import INK, colour, drawing
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm, mixing_matrix, record_statistics, spectral_radius

GROUPS, BATCH, CHANNELS, PIXELS = 8, 64, 16, 8
SEEDS = range(9)
MODES = ("local", "sync", "regroup", "swap")
DEPTHS = {"plain": (10, 20, 50), "residual": (17, 49)}
EPS = 1e-5


def normalised(inputs: int, mode: str) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, CHANNELS, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    return [convolution, ShuffleBatchNorm(CHANNELS, EPS, mode=mode, groups=GROUPS)]


class Residual(nn.Module):
    """Two layers around which the input goes as well."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        first, second = normalised(CHANNELS, mode), normalised(CHANNELS, mode)
        self.branch = nn.Sequential(*first, nn.ReLU(), *second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))


def stages(kind: str, mode: str) -> list[tuple[int, nn.Module]]:
    """Modules in order, each with the number of layers up to its end."""
    depth = DEPTHS[kind][-1]
    stem = nn.Sequential(*normalised(3, mode), nn.ReLU())
    if kind == "plain":
        rest = [nn.Sequential(*normalised(CHANNELS, mode), nn.ReLU()) for _ in range(1, depth)]
        return list(enumerate([stem, *rest], start=1))
    blocks = [Residual(mode) for _ in range((depth - 1) // 2)]
    return [(1, stem), *((2 * k + 3, block) for k, block in enumerate(blocks))]


def run(kind: str, mode: str, seed: int) -> tuple[dict[int, float], list[float]]:
    """Per depth the largest |activation|, and per layer how far means are from the normaliser's."""
    torch.manual_seed(seed)
    x = torch.randn(BATCH, 3, PIXELS, PIXELS, dtype=torch.float64)
    parts = stages(kind, mode)
    network = nn.ModuleList(module for _, module in parts).double()
    largest = {}
    with torch.no_grad(), record_statistics(network) as records:
        for depth, module in parts:
            x = module(x)
            largest[depth] = float(x.abs().max())
    left = [(r.own_mean - r.used_mean) / (r.used_var + EPS).sqrt() for r in records]
    return largest, [float(rest.square().mean().sqrt()) for rest in left]


class Found(NamedTuple):
    """What the seeds gave for one network and mode."""

    largest: dict[int, list[float]]  # per depth, all seeds
    left: list[float]  # per layer, the median


def measure(kind: str, mode: str) -> Found:
    runs = [run(kind, mode, seed) for seed in SEEDS]
    largest = {depth: sorted(one[depth] for one, _ in runs) for depth in runs[0][0]}
    left = [median(values) for values in zip(*(left for _, left in runs), strict=True)]
    return Found(largest, left)


def radius(mode: str) -> float:
    matrix = mixing_matrix(mode, world_size=1, groups=GROUPS, batch_size=BATCH)
    return spectral_radius(matrix)


def number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def draw_largest(axes: Axes, kind: str, largest: dict[str, dict[int, list[float]]]) -> None:
    for mode, values in largest.items():
        depths, runs = list(values), list(values.values())
        low, high = [min(run) for run in runs], [max(run) for run in runs]
        axes.fill_between(depths, low, high, color=colour(mode), alpha=0.16, linewidth=0)
        axes.plot(depths, [median(run) for run in runs], color=colour(mode))
    name = "plain CNN" if kind == "plain" else "residual network"
    axes.set(yscale="log", title=name, xlabel="layer", ylim=(1, 1e32), xlim=(0, 51))
    axes.set_yticks([10.0**power for power in range(0, 33, 8)])


def draw_first_layers(axes: Axes, left: dict[str, list[float]], radius: float) -> None:
    """The distance of means in the first layers, and the growth that the spectral radius allows."""
    few = range(1, 11)
    for mode in ("sync", "regroup", "swap"):  # in local nothing is left
        axes.plot(few, left[mode][: len(few)], color=colour(mode), marker="o")
    slope = [left["swap"][0] * radius ** (layer - 1) for layer in few]
    axes.plot(few, slope, color=INK, linestyle="--", linewidth=1)
    axes.set(title="plain CNN, first layers", xlabel="layer", xticks=few[1::2])
    axes.set_ylabel("distance of means, in std")
    axes.set_yscale("log", base=2)


def print_table(found: dict[tuple[str, str], Found], radii: dict[str, float]) -> None:
    plain, residual = (" / ".join(map(str, depths)) for depths in DEPTHS.values())
    print(f"| mode | spectral radius | plain CNN {plain} layers | residual {residual} layers |")
    print("|---|---|---|---|")
    for mode in MODES:
        cells = [
            " / ".join(number(median(found[kind, mode].largest[depth])) for depth in depths)
            for kind, depths in DEPTHS.items()
        ]
        print(f"| `{mode}` | {radii[mode]:.2f} | {cells[0]} | {cells[1]} |")
    print()
    for kind, depths in DEPTHS.items():
        ends = {mode: found[kind, mode].largest[depths[-1]] for mode in MODES}
        print(f"{kind}, {depths[-1]} layers, over the seeds:")
        print(f"  swap from {number(ends['swap'][0])} to {number(ends['swap'][-1])}")
        for mode in ("sync", "regroup"):
            print(f"  {mode} / local: {median(ends[mode]) / median(ends['local']):.2f}")
    left, largest = found["plain", "swap"].left, found["plain", "swap"].largest
    early = (left[6] / left[0]) ** (1 / 6)
    late = (median(largest[50]) / median(largest[20])) ** (1 / 30)
    print(f"swap, plain: the distance of means grows {early:.2f} times a layer, layers 1 to 7")
    print(f"swap, plain: the largest activation grows {late:.2f} times a layer, layers 20 to 50")


def main() -> None:
    torch.set_num_threads(1)  # the tensors are small
    found = {(kind, mode): measure(kind, mode) for kind in DEPTHS for mode in MODES}
    radii = {mode: radius(mode) for mode in MODES}
    print_table(found, radii)

    with drawing("stability.png", 2.9) as figure:
        axes = figure.subplots(1, 3)
        for ax, kind in zip(axes, DEPTHS, strict=False):
            draw_largest(ax, kind, {mode: found[kind, mode].largest for mode in MODES})
        axes[0].set_ylabel("largest |activation|")
        left = {mode: found["plain", mode].left for mode in MODES}
        draw_first_layers(axes[2], left, radii["swap"])
        styles: dict[str, dict[str, Any]]
        styles = {f"{mode}, radius {radii[mode]:.0f}": dict(color=colour(mode)) for mode in MODES}
        styles["growth of 2 per layer"] = dict(color=INK, linestyle="--", linewidth=1)
        handles = [axes[0].plot([], [], label=name, **style)[0] for name, style in styles.items()]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=5, fontsize=8, handlelength=1.4,
            columnspacing=1.2,
        )  # fmt: skip


if __name__ == "__main__":
    main()
