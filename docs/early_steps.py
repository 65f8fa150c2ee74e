"""Print the table of docs/comparison.md on the first epochs: what the pretext accuracy says there.

python docs/early_steps.py

It takes the first epochs of `train --bn regroup --ranks 1 --groups 32 --device cpu`, as they are
and with one thing changed, and compares each step's queries and keys with other queues too. All
seeds are in benchmarks/results/early_steps.json.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shuffle_batchnorm.moco.config import Config, NormConfig, RunConfig
from shuffle_batchnorm.moco.data.loading import load_data
from shuffle_batchnorm.moco.model import MoCo, Step
from shuffle_batchnorm.moco.random_state import own_random_state
from shuffle_batchnorm.moco.ranks.launch import Rank, launch
from shuffle_batchnorm.moco.trainer import Trainer
from shuffle_batchnorm.probe.isolation import isolated

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import harness

SEEDS, EPOCHS = (10, 11, 12), 12
FILLING = 10_000  # an epoch that no run comes to; its images and views fill a queue
# What differs from the defaults of `train`; `filled` begins with keys in the queue, not directions.
CASES: dict[str, dict[str, Any]] = {
    "as in the comparison": {},
    "queue filled with keys": {"filled": True},
    "filled, momentum 0.9": {"filled": True, "momentum": 0.9},
    "filled, warm-up of 5 epochs": {"filled": True, "warmup_epochs": 5},
    "filled, learning rate 0.03": {"filled": True, "lr": 0.03},
}
COLUMNS = {"step 1": (0, 1), "steps 2 to 5": (1, 5)} | {
    f"epoch {epoch}": (5 * epoch - 5, 5 * epoch) for epoch in (2, 4, 8, 12)
}
SHOWN = {step for first, last in COLUMNS.values() for step in range(first, last)}
SCORES = ("accuracy", "re_encoded", "other_images", "cosine")
Row = dict[str, float]


def watch(rank: Rank, config: Config, filled: bool) -> list[Row]:
    """Train for the first epochs; return what queries and keys of the steps shown say."""
    rows: list[Row] = []
    with ExitStack() as stack:
        stack.enter_context(own_random_state())
        images: Any = load_data(config.data)
        trainer = Trainer(rank, config, images, None)
        stack.callback(trainer.close)
        model, length = trainer.model, config.moco.queue
        steps_held = length // config.optim.batch_size
        queue = model.queue.clone()
        views: list[Tensor] = []  # that the keys in the queue are of, step by step
        owners = torch.full((length,), -1)  # their images; -1 is a direction of the beginning
        order: list[list[int]] = []  # of the epoch's images, step by step

        def encode() -> Tensor:
            with torch.no_grad(), isolated(model.modules(), []):
                return torch.cat([queue[owners < 0], *map(model.encode_key, views[-steps_held:])])

        def before(*_: object) -> None:
            queue.copy_(model.queue)

        def after(_: MoCo, inputs: tuple[Tensor, Tensor], step: Step) -> None:
            batch = torch.tensor(order[trainer.step_in_epoch])
            if trainer.step in SHOWN:
                rows.append(measure(batch, step))
            views.append(inputs[1])
            end = int(model.queue_pointer)
            owners[torch.arange(end - len(batch), end) % length] = batch

        def measure(batch: Tensor, step: Step) -> Row:
            positive = (step.queries * step.keys).sum(1)
            similar = step.queries @ queue.T
            others = similar.masked_fill(batch[:, None] == owners, -1.0)
            cosines = step.keys @ step.keys.T
            numbers = {
                "accuracy": step.accuracy,
                "re_encoded": _top_1(positive, step.queries @ encode().T),
                "other_images": _top_1(positive, others),
                "cosine": (cosines.sum() - len(batch)) / (len(batch) * (len(batch) - 1)),
            }
            figures = {name: float(number) for name, number in numbers.items()}
            return {"step": trainer.step + 1, **figures}

        if filled:
            trainer.batches.set_epoch(FILLING)
            for step, numbers in enumerate(list(trainer.batches)[:steps_held]):
                views.append(trainer.views.of_step(images.train.images[numbers], FILLING, step)[1])
            owners = torch.tensor(list(trainer.batches)[:steps_held]).flatten()
            model.queue.copy_(encode())
        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)
        for epoch in range(EPOCHS):
            trainer.batches.set_epoch(epoch)
            order = list(trainer.batches)
            trainer.train_epoch(epoch)
            trainer.step_in_epoch = 0
    return rows


def _top_1(positive: Tensor, negatives: Tensor) -> Tensor:
    return (positive > negatives.amax(1)).float().mean()


def run(case: dict[str, Any], seed: int) -> list[Row]:
    """Return the steps of one run."""
    config = Config(norm=NormConfig(bn="regroup", groups=32))
    chosen = {name: value for name, value in case.items() if name != "filled"}
    moco = {name: value for name, value in chosen.items() if hasattr(config.moco, name)}
    optim = {name: value for name, value in chosen.items() if hasattr(config.optim, name)}
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            moco=replace(config.moco, **moco),
            optim=replace(config.optim, **optim),
            run=RunConfig(
                Path(folder), seed=seed, ranks=1, device="cpu", log_every=10_000, tensorboard=False
            ),
        )
        rows: list[Row] = launch(watch, config, "filled" in case, ranks=1, device="cpu")
    return rows


def line(runs: Sequence[list[Row]], score: str) -> str:
    """Return the cells of one case: means over the seeds, and over the steps of each column."""
    cells = [
        statistics.fmean(row[score] for rows in runs for row in rows if first < row["step"] <= last)
        for first, last in COLUMNS.values()
    ]
    return " | ".join(f"{cell:.3f}" for cell in cells)


def main() -> None:
    torch.set_num_threads(1)
    results = {name: [run(case, seed) for seed in SEEDS] for name, case in CASES.items()}
    for score in SCORES:
        print(f"| {score} | {' | '.join(COLUMNS)} |")
        for name, runs in results.items():
            print(f"| {name} | {line(runs, score)} |")
    rows = [
        {"case": name, "seed": seed, **row}
        for name, runs in results.items()
        for seed, steps in zip(SEEDS, runs, strict=True)
        for row in steps
    ]
    harness.save("early_steps", rows)


if __name__ == "__main__":
    main()
