"""Measure trained networks with other numbers of blocks: what reading the signature explains.

    python docs/fixed_network.py runs/study/runs/n8-B1-seed*/last.pt

Every network stays as it is; only the normalisation of its keys changes. Compare with the study's
cells of the same n, whose networks were trained with their blocks.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from shuffle_batchnorm.moco.build import Views, build_model
from shuffle_batchnorm.moco.checkpoint import load
from shuffle_batchnorm.moco.comparison.summary import mean_over_seeds
from shuffle_batchnorm.moco.comparison.tables import with_error
from shuffle_batchnorm.moco.config import NormConfig, from_dict
from shuffle_batchnorm.moco.data.loading import load_data
from shuffle_batchnorm.moco.measure import Measurements
from shuffle_batchnorm.moco.ranks.launch import Rank
from shuffle_batchnorm.moco.resume import restore_model


def leak(path: Path, blocks: int) -> float:
    """Return the leak of a checkpoint's network with so many blocks; 1 is local."""
    state = load(path)
    trained = from_dict(state["config"])
    groups = trained.norm.groups
    norm = NormConfig("regroup", groups, blocks) if blocks > 1 else NormConfig("local", groups)
    config = replace(trained, norm=norm)
    rank = Rank(0, 1, torch.device("cpu"))
    images = load_data(config.data)
    model = build_model(config, images, rank.device)
    restore_model(model, state, rank)
    views = Views(config, images, rank)
    return Measurements(config, model, images, views, rank).leak().leak


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| blocks | leak |\n|---|---|")
    for blocks in (1, 2, 3, 4, 6, 8):
        leaks = [leak(Path(path), blocks) for path in sys.argv[1:]]
        print(f"| {blocks} | {with_error(mean_over_seeds(leaks))} |", flush=True)
