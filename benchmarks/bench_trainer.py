"""Where a training step's time goes: what the trainer adds to the network's own work.

Counted apart: augmentation; forward, with the keys, the queue and the exchange of statistics;
backward, with the exchange of gradients; the optimizer. The overhead is all else between the first
and the last step of an epoch: loading, learning rate, figures, log rows, the agreement on signals.

    python benchmarks/bench_trainer.py --ranks 2 --groups 16
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from shuffle_batchnorm.moco.config import Config, MoCoConfig, NormConfig, OptimConfig, RunConfig
from shuffle_batchnorm.moco.data.loading import load_data
from shuffle_batchnorm.moco.random_state import own_random_state
from shuffle_batchnorm.moco.ranks.launch import Rank, launch
from shuffle_batchnorm.moco.trainer import Trainer

PARTS = ("augmentation", "forward", "backward", "optimizer")


def measure(rank: Rank, config: Config) -> list[dict[str, float]]:
    """Milliseconds per step of every epoch but the first, on one rank."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = now(rank)
            result = function(*args, **kwargs)
            seconds[part] += now(rank) - begun
            return result

        return call

    rows = []
    with ExitStack() as stack:
        stack.enter_context(own_random_state())
        trainer: Any = Trainer(rank, config, load_data(config.data), None)
        stack.callback(trainer.close)
        trainer.views.of_step = timed("augmentation", trainer.views.of_step)
        trainer.parallel.forward = timed("forward", trainer.parallel.forward)
        trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
        stack.callback(setattr, torch.Tensor, "backward", torch.Tensor.backward)
        torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
        for epoch in range(config.optim.epochs):
            seconds.clear()
            begun = now(rank)
            trainer.train_epoch(epoch)
            whole = now(rank) - begun
            steps = trainer.batches.steps
            row = {part: 1000 * seconds[part] / steps for part in PARTS}
            rows.append(row | {"step": 1000 * whole / steps})
            trainer.epoch, trainer.step_in_epoch = epoch + 1, 0
        trainer.stop.answer()
    return rows[1:]


def now(rank: Rank) -> float:
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--groups", type=int, default=32, help="on each rank")
    parser.add_argument("--bn", default="regroup")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            norm=NormConfig(bn=options.bn, groups=options.groups),
            moco=MoCoConfig(queue=1024),
            optim=OptimConfig(epochs=options.epochs, batch_size=options.batch_size),
            run=RunConfig(output=Path(folder), ranks=options.ranks, device=options.device),
        )
        rows = launch(measure, config, ranks=options.ranks, device=options.device)
    for row in rows:
        row["overhead"] = row["step"] - sum(row[part] for part in PARTS)
        work = row["step"] - row["overhead"]
        row["share_of_step"] = row["overhead"] / row["step"]
        row["share_without_augmentation"] = row["overhead"] / (work - row["augmentation"])
    names = (*PARTS, "overhead", "step", "share_of_step", "share_without_augmentation")
    medians = {name: statistics.median(row[name] for row in rows) for name in names}
    for name, value in medians.items():
        text = f"{value:7.1%}" if name.startswith("share") else f"{value:7.2f} ms"
        print(f"{name:27}{text}")
    print(json.dumps({name: round(value, 4) for name, value in medians.items()}))


if __name__ == "__main__":
    main()
