"""Print the table of docs/comparison.md on old keys: what the queue's age adds to the accuracy.

python docs/queue_age.py

Seeds 10 to 12 of `train --bn regroup --ranks 1 --groups 32 --device cpu`. After some epochs the
next step's queries are asked for their keys twice: against the queue as it is, and against keys of
the same views that the present key encoder makes.
"""

import copy
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.moco.config import Config, MoCoConfig, NormConfig, RunConfig
from shuffle_batchnorm.moco.data.loading import load_data
from shuffle_batchnorm.moco.random_state import own_random_state
from shuffle_batchnorm.moco.ranks.launch import Rank, launch
from shuffle_batchnorm.moco.trainer import Trainer

SEEDS = (10, 11, 12)
EPOCHS = {0.99: (4, 8, 12, 20, 40), 0.9: (4, 12)}  # by momentum of the key encoder


class Seen(NamedTuple):
    """Pretext accuracy against the queue and against it encoded anew; mean cosine of two keys."""

    queue: float
    anew: float
    cosine: float


def measure(trainer: Trainer, images: Any, epoch: int) -> Seen:
    """Look at the first step of an epoch, and leave the trainer as it is."""
    model = copy.deepcopy(trainer.model)
    steps, count = trainer.batches.steps, trainer.config.optim.batch_size

    def views(step: int) -> tuple[Tensor, Tensor]:
        trainer.batches.set_epoch(step // steps)
        numbers = list(trainer.batches)[step % steps]
        return trainer.views.of_step(images.train.images[numbers], step // steps, step % steps)

    now = epoch * steps
    model.update_key()
    view_1, view_2 = views(now)
    queries, keys = model.encoder_q(view_1), model.encode_key(view_2)
    held = range(now - len(model.queue) // count, now)
    anew = torch.cat([model.encode_key(views(step)[1]) for step in held])
    positive = (queries * keys).sum(1)
    queue, renewed = (
        float((positive > (queries @ negatives.T).amax(1)).double().mean())
        for negatives in (model.queue, anew)
    )
    cosine = (float((keys @ keys.T).sum()) - count) / (count * (count - 1))
    return Seen(queue, renewed, cosine)


def watch(rank: Rank, config: Config, epochs: tuple[int, ...]) -> list[Seen]:
    """Train, and look after each of these epochs."""
    seen = []
    with ExitStack() as stack:
        stack.enter_context(own_random_state())
        images = load_data(config.data)
        trainer = Trainer(rank, config, images, None)
        stack.callback(trainer.close)
        for epoch in range(epochs[-1]):
            trainer.train_epoch(epoch)
            trainer.step_in_epoch = 0
            if epoch + 1 in epochs:
                with torch.no_grad():
                    seen.append(measure(trainer, images, epoch + 1))
    return seen


def main() -> None:
    torch.set_num_threads(1)
    print("| momentum | epochs | queue | encoded anew | cosine of keys |")
    for momentum, epochs in EPOCHS.items():
        runs = []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                config = Config(
                    norm=NormConfig(bn="regroup", groups=32),
                    moco=MoCoConfig(momentum=momentum),
                    run=RunConfig(Path(folder), seed, tensorboard=False, log_every=1_000),
                )
                runs.append(launch(watch, config, epochs, ranks=1, device="cpu"))
        for epoch, seeds in zip(epochs, zip(*runs, strict=True), strict=True):
            cells = [f"{statistics.fmean(values):.3f}" for values in zip(*seeds, strict=True)]
            print(f"| {momentum} | {epoch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
