"""What the study trains: cells, each a name and what differs from the base, and their runs.

The base is `train` on one process, with settings that later defaults don't change. n is the number
of samples in a group, G the number of groups and B the number of blocks that each is cut into;
B = 1 is mode ``local``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from shuffle_batchnorm.moco.config import Config, ConfigError, Dataset, RunConfig, validate

CALL = "study"
# Not 0 to 4, with which the defaults of `train` were chosen.
SEEDS = (10, 11, 12, 13, 14)
BATCH = 256
# The defaults of `train` when the study was made: the rules that come of it may change them.
BASE: dict[str, Any] = {
    "network": "small", "depth": 4, "stem": "auto", "dim": 128, "mlp": True, "offset": 1,
    "queue": 1024, "momentum": 0.99, "temperature": 0.07, "symmetric": False, "buffers": "own",
    "epochs": 60, "batch_size": BATCH, "lr": 0.12, "sgd_momentum": 0.9, "weight_decay": 5e-4,
    "warmup_epochs": 0, "accumulate": 1,
}  # fmt: skip
GROUP = 8  # samples, wherever it is not the group that differs
FASHION_EPOCHS, FASHION_SEEDS = 5, 3
# By their share of the leak of `local`, the largest first, as measured in a prototype.
LAYERS = ("backbone.layers.10", "backbone.layers.1", "backbone.layers.7", "backbone.layers.4")
# Not fitted but predicted; chosen before any cell was trained.
HELD_OUT = ("n16-B3", "n32-B2")


@dataclass(frozen=True)
class Cell:
    """One setting of the study.

    Attributes:
        name: of the cell, and of the folders of its runs.
        part: what it is for: grid, control, depth, epochs, temperature, layers or fashion.
        changes: fields of `Config`, whichever part of it they are in, to values.
        seeds: it has the first so many of the study's.
    """

    name: str
    part: str
    changes: dict[str, Any] = field(hash=False)
    seeds: int = len(SEEDS)

    @property
    def dataset(self) -> Dataset:
        """The data set that it is trained on."""
        dataset: Dataset = self.changes.get("dataset", Config().data.dataset)
        return dataset


class Run(NamedTuple):
    """A cell with a seed."""

    cell: Cell
    seed: int
    config: Config


def norm(n: int, blocks: int, batch: int = BATCH) -> dict[str, Any]:
    """The batch norm of groups of n samples in B blocks.

    Example:
        >>> norm(8, 2)
        {'groups': 32, 'bn': 'regroup', 'blocks': 2}
    """
    mode = {"bn": "local"} if blocks == 1 else {"bn": "regroup", "blocks": blocks}
    size = {"batch_size": batch} if batch != BATCH else {}
    return {"groups": batch // n, **mode, **size}


def grid() -> Iterator[Cell]:
    """Group size and blocks; groups of 64 take a batch of 512, which some of 8 are a control of."""
    for n in (4, 8, 16, 32, 64):
        batch = 2 * BATCH if n == 64 else BATCH
        for blocks in (1, 2, 3, 4, 6, 8):
            if blocks <= min(n, batch // n):
                yield Cell(f"n{n}-B{blocks}", "grid", norm(n, blocks, batch))
    for blocks in (1, 2, 4):
        name = f"n{GROUP}-B{blocks}-batch{2 * BATCH}"
        yield Cell(name, "control", norm(GROUP, blocks, 2 * BATCH))


def others() -> Iterator[Cell]:
    """What else the leak may depend on, each without the base's own value, which the grid has."""
    for name, values, all_blocks in (
        ("depth", (2, 6, 8), (1, 2, 4)),
        ("epochs", (15, 30, 120), (1, 2, 4)),
        ("temperature", (0.05, 0.1, 0.2, 0.5), (1, 2)),
    ):
        for value in values:
            for blocks in all_blocks:
                changes = {**norm(GROUP, blocks), name: value}
                yield Cell(f"{name}{value}-B{blocks}", name, changes)


def layers() -> Iterator[Cell]:
    """Only some layers converted; none is n8-B1 and all are n8-B8, which the grid has."""
    for order, names in (("largest", LAYERS), ("smallest", LAYERS[::-1])):
        for count in range(1, len(names)):
            changes = {**norm(GROUP, GROUP), "layers": ",".join(names[:count])}
            yield Cell(f"layers-{order}{count}", "layers", changes)


def fashion() -> Iterator[Cell]:
    """Some of the grid on 60,000 images."""
    data = {"dataset": "fashion-mnist", "image_size": 16, "queue": 4096, "epochs": FASHION_EPOCHS}
    for n in (8, 32):
        for blocks in (1, 2, 4):
            changes = {**norm(n, blocks), **data}
            yield Cell(f"fashion-n{n}-B{blocks}", "fashion", changes, FASHION_SEEDS)


CELLS = (*grid(), *others(), *layers(), *fashion())


def chosen(pattern: str) -> tuple[Cell, ...]:
    """The cells whose names match one of the patterns, which commas separate.

    Raises:
        ConfigError: a pattern that matches none.

    Example:
        >>> [cell.name for cell in chosen("n4-*,n8-B[12]")]
        ['n4-B1', 'n4-B2', 'n4-B3', 'n4-B4', 'n8-B1', 'n8-B2']
    """
    patterns = [one.strip() for one in pattern.split(",")]
    names = [cell.name for cell in CELLS]
    for one in patterns:
        if not any(fnmatchcase(name, one) for name in names):
            raise ConfigError(f"{CALL}: --cells {one} matches none of {', '.join(names)}")
    return tuple(cell for cell in CELLS if any(fnmatchcase(cell.name, one) for one in patterns))


def configure(cell: Cell, seed: int, output: Path, data_path: Path | None = None) -> Config:
    """The configuration of a run, in its folder of a study's folder."""
    config = Config(
        run=RunConfig(
            output=output / "runs" / f"{cell.name}-seed{seed}",
            seed=seed,
            ranks=1,
            device="cpu",
            resume=True,
            tensorboard=False,
            eval_every=1000,  # the last epoch has its evaluation, and no other is needed
        )
    )
    moved = {"data_path": data_path} if "dataset" in cell.changes else {}
    for name, value in (BASE | cell.changes | moved).items():
        [part] = [one for one, values in asdict(config).items() if name in values]
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config


def planned(
    cells: Sequence[Cell], seeds: Sequence[int], output: Path, data_path: Path | None = None
) -> list[Run]:
    """All runs in their order: seed by seed, so that an interrupted study is fair.

    Raises:
        ConfigError: no seed, or one twice; a run that can't be trained.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{CALL}: --seeds must name seeds, each once, got {list(seeds)}")
    runs = [
        Run(cell, seed, configure(cell, seed, output, data_path))
        for position, seed in enumerate(seeds)
        for cell in cells
        if position < cell.seeds
    ]
    for run in runs:
        validate(run.config, 1)
    return runs
