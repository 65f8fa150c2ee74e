"""The cells: how many, which, and that each can be trained."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from shuffle_batchnorm.moco.build import normalise_key
from shuffle_batchnorm.moco.config import Config, ConfigError, flat
from shuffle_batchnorm.moco.networks import make_encoder
from shuffle_batchnorm.moco.study.cells import (
    BASE,
    CELLS,
    HELD_OUT,
    SEEDS,
    chosen,
    configure,
    planned,
)
from shuffle_batchnorm.norm.modules import ShuffleBatchNorm

NAMES = [cell.name for cell in CELLS]


def test_there_are_as_many_as_the_plan_says() -> None:
    parts = Counter(cell.part for cell in CELLS)
    assert parts == {
        "grid": 28,
        "control": 3,
        "depth": 9,
        "epochs": 9,
        "temperature": 8,
        "layers": 6,
        "fashion": 6,
    }
    plan = planned(CELLS, SEEDS, Path())
    assert len(plan) == 63 * 5 + 6 * 3


def test_a_folder_belongs_to_one_run() -> None:
    """Catches two cells of one name, and two names of one configuration."""
    plan = planned(CELLS, SEEDS, Path("study"))
    assert len({run.config.run.output for run in plan}) == len(plan)
    settings = [flat(configure(cell, 0, Path())) | {"output": None} for cell in CELLS]
    assert all(settings.count(one) == 1 for one in settings)


def test_the_grid_is_every_size_with_every_number_of_blocks_that_it_allows() -> None:
    """Catches more blocks than samples in a group, or than groups: fewer would be cut."""
    found: dict[int, list[int]] = {}
    for cell in CELLS:
        config = configure(cell, 10, Path())
        groups, batch = config.norm.groups, config.optim.batch_size
        blocks = 1 if config.norm.bn == "local" else config.norm.blocks
        n = batch // groups
        assert blocks <= min(n, groups)
        if cell.part == "layers":
            assert (n, blocks) == (8, 8)
            continue
        assert cell.name.endswith((f"-B{blocks}", f"-B{blocks}-batch512"))
        if cell.part == "grid":
            assert cell.name == f"n{n}-B{blocks}"
            found.setdefault(n, []).append(blocks)
        elif cell.part == "fashion":
            assert cell.name == f"fashion-n{n}-B{blocks}"
        else:
            assert n == 8
    every = [1, 2, 3, 4, 6, 8]
    assert found == {4: [1, 2, 3, 4], **dict.fromkeys((8, 16, 32, 64), every)}


def test_layers_are_converted_by_their_share() -> None:
    """Catches a name that the network does not have, and an order that is not the other's end."""
    networks = {
        cell.name: normalise_key(make_encoder(config.network, 1, 16), config.norm)
        for cell in CELLS
        if cell.part == "layers"
        for config in [configure(cell, 10, Path())]
    }
    numbers = {
        name: {
            int(layer.rpartition(".")[2])
            for layer, module in network.named_modules()
            if isinstance(module, ShuffleBatchNorm) and module.mode == "regroup"
        }
        for name, network in networks.items()
    }
    assert numbers == {
        "layers-largest1": {10},
        "layers-largest2": {10, 1},
        "layers-largest3": {10, 1, 7},
        "layers-smallest1": {4},
        "layers-smallest2": {4, 7},
        "layers-smallest3": {4, 7, 1},
    }


def test_held_out_cells_are_in_the_grid() -> None:
    assert set(HELD_OUT) <= {cell.name for cell in CELLS if cell.part == "grid"}


def test_a_run_is_the_base_with_the_changes_of_its_cell() -> None:
    """Catches a change that goes to no field, and one that nobody asked for."""
    base = flat(configure(chosen("n8-B8")[0], 10, Path()))
    assert {name: base[name] for name in ("seed", "ranks", "device", "resume")} == {
        "seed": 10,
        "ranks": 1,
        "device": "cpu",
        "resume": True,
    }
    same = {"output", "seed", "ranks", "device", "resume", "tensorboard", "eval_every", "groups"}
    plain = flat(Config())
    assert {name for name in base if base[name] != plain[name]} <= same
    for cell in CELLS:
        run = flat(configure(cell, 10, Path()))
        assert {name: run[name] for name in cell.changes} == cell.changes
        changed = {name for name in run if run[name] != base[name]} - {"output"}
        assert changed <= cell.changes.keys(), cell.name


def test_later_defaults_change_no_cell() -> None:
    """Catches a setting of `train` that the study leaves to its default of the day."""
    config = Config()
    parts = [asdict(part) for part in (config.network, config.moco, config.optim)]
    assert BASE.keys() == {name for part in parts for name in part} | {"offset"}
    for cell in CELLS:
        run = flat(configure(cell, 10, Path()))
        assert {name: run[name] for name in BASE} == {
            name: cell.changes.get(name, value) for name, value in BASE.items()
        }


def test_runs_are_seed_by_seed(tmp_path: Path) -> None:
    cells = chosen("n8-B1,n8-B2")
    plan = planned(cells, (11, 10), tmp_path)
    assert [(run.cell.name, run.seed) for run in plan] == [
        ("n8-B1", 11),
        ("n8-B2", 11),
        ("n8-B1", 10),
        ("n8-B2", 10),
    ]
    assert plan[1].config.run.output == tmp_path / "runs" / "n8-B2-seed11"


@pytest.mark.parametrize("seeds", [(), (10, 10)])
def test_seeds_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"study: --seeds must name seeds, each once, got \["):
        planned(CELLS, seeds, Path())


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"study: --cells m\* matches none of n4-B1, n4-B2"):
        chosen("n8-B1, m*")
