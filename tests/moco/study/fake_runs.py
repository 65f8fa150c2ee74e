"""A trainer that trains nothing, for the tests of the study: a record, and where it came from."""

import random
from typing import Any

from shuffle_batchnorm.moco.checkpoint import folder_lock, write_json
from shuffle_batchnorm.moco.config import Config, to_dict
from shuffle_batchnorm.moco.journal import CONFIG, RECORD

Record = dict[str, Any]


def record_of(config: Config) -> Record:
    """What a run might have measured: a leak that falls with the blocks, and a curve."""
    norm, seed = config.norm, config.run.seed
    noise = random.Random(f"{norm} {seed}")
    blocks = 1 if norm.bn == "local" else norm.blocks
    leak = 0.5 / blocks**2 + noise.gauss(0, 0.01)
    return dict(
        bn=norm.bn,
        seed=seed,
        leak=leak,
        leak_standard_error=0.01,
        leak_interval=[leak - 0.02, leak + 0.02],
        leak_as_trained=0.2 + leak,
        leak_fresh=0.2,
        knn=0.97 + noise.gauss(0, 0.002),
        pretext_accuracy=0.3,
        loss=3.0,
        seconds=1.0,
        curve=[dict(epoch=1, loss=3.0)],
        diverged=False,
        complete=True,
    )


def train(config: Config) -> Record:
    """Write what the trainer writes of a run that ends at once."""
    folder = config.run.output
    with folder_lock(folder, patience=0):
        record = record_of(config)
        start = dict(versions=dict(torch="2"), commit="abc", processor="a CPU", cpus=2, time="now")
        described = dict(config=to_dict(config), world_size=1, starts=[start])
        write_json(folder / CONFIG, described)
        write_json(folder / RECORD, record)
    return record
