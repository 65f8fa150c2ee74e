"""Records of runs that never were, for the tests of the comparison."""

import math
import random
from collections.abc import Collection, Iterable
from typing import Any

Record = dict[str, Any]


def made_up_record(bn: str = "local", seed: int = 0, **changes: Any) -> Record:
    """A run of 10 epochs with a leak for local alone; kNN is known at every second epoch."""
    noise = random.Random(f"{bn} {seed}")
    leak = (0.3 if bn == "local" else 0.0) + noise.gauss(0, 0.01)
    knn = (0.9 if bn == "swap" else 0.97) + noise.gauss(0, 0.002)
    curve = [
        dict(
            epoch=epoch,
            loss=7 - epoch / 10,
            pretext_accuracy=0.04 * epoch + noise.gauss(0, 0.01),
            knn=knn - 0.1 * math.exp(-epoch) if epoch % 2 == 0 else None,
            lr=0.06,
            seconds=float(epoch),
        )
        for epoch in range(1, 11)
    ]
    growth = 2.0 if bn == "swap" else 1.0
    record = dict(
        bn=bn,
        seed=seed,
        epochs=10,
        world_size=2,
        groups=16,
        blocks=8,
        offset=1,
        leak=leak,
        leak_standard_error=0.01,
        leak_interval=[leak - 0.02, leak + 0.02],
        leak_as_trained=0.3 + leak,
        leak_fresh=0.3,
        knn=knn,
        pretext_accuracy=0.4,
        loss=6.0,
        seconds=10.0 + seed,
        samples_per_second=1500.0,
        spectral_radius=growth,
        curve=curve,
        stability=dict(
            layers=[f"{layer}" for layer in range(4)],
            ratio=[growth**layer for layer in range(4)],
            spectral_radius=growth,
        ),
        complete=True,
    )
    return record | changes


def diverged_record(bn: str = "swap", seed: int = 0) -> Record:
    """A run whose numbers went to NaN after epoch 4; its keys are all alike, so its leak is 0."""
    nan = math.nan
    record = made_up_record(bn, seed)
    rest = [entry | dict(loss=nan, pretext_accuracy=nan, knn=nan) for entry in record["curve"][4:]]
    return record | dict(loss=nan, knn=nan, leak=0.0, curve=record["curve"][:4] + rest)


def made_up_records(
    bns: Iterable[str] = ("local", "sync", "swap", "regroup", "batch-shuffle"),
    seeds: Iterable[int] = range(3),
    diverged: Collection[tuple[str, int]] = (),
) -> list[Record]:
    """Runs seed by seed."""
    return [
        (diverged_record if (bn, seed) in diverged else made_up_record)(bn, seed)
        for seed in seeds
        for bn in bns
    ]
