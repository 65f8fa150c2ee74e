"""MoCo v2 in Lightning: two callbacks convert the encoders for the time of the fit.

    python examples/lightning_moco.py                   # one device
    python examples/lightning_moco.py --devices 2       # two ranks, on CPUs or GPUs

The LightningModule is built with plain batch norm, and has it again after the fit.
"""

import argparse
import copy

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import common
from moco_v2 import MoCo
from shuffle_batchnorm.integrations.lightning import ShuffleBatchNormCallback


class LightningMoCo(pl.LightningModule):
    """`moco_v2.MoCo` as a LightningModule; nothing in it is this library's."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        encoder = common.network(args.arch)
        self.args = args
        self.moco = MoCo(encoder, copy.deepcopy(encoder), args.queue)

    def training_step(self, views: list[Tensor]) -> dict[str, Tensor]:
        view_1, view_2 = views
        keys = self.moco.encode_key(view_2, momentum=0.99)
        queries = F.normalize(self.moco.encoder_q(view_1), dim=1)
        loss, accuracy = self.moco.contrast(queries, keys, t=0.1)
        self.log("accuracy", accuracy, prog_bar=True)
        self.log("loss", loss, prog_bar=True)
        return {"loss": loss, "keys": keys}

    # Not in the step: its backward pass still needs the queue as it was.
    def on_train_batch_end(self, outputs: dict[str, Tensor], *_: object) -> None:  # type: ignore[override]
        self.moco.enqueue(outputs["keys"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.moco.encoder_q.parameters()
        return torch.optim.SGD(parameters, self.args.lr, momentum=0.9, weight_decay=1e-4)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return common.load(self.args)


def train(args: argparse.Namespace) -> pl.Trainer:
    """Fit on all devices, and return the Trainer."""
    pl.seed_everything(0)  # the same encoders and queue on all ranks
    groups = common.fewest_groups(args.batch_size, args.devices)
    callbacks: list[pl.Callback] = [
        ShuffleBatchNormCallback("moco.encoder_q", mode="local", groups=groups),
        ShuffleBatchNormCallback("moco.encoder_k", mode="regroup", groups=groups),
    ]
    trainer = pl.Trainer(
        devices=args.devices,
        max_steps=args.steps,
        use_distributed_sampler=False,  # `load` deals the samples to the ranks
        enable_checkpointing=False,
        logger=False,
        callbacks=callbacks,
    )
    trainer.fit(LightningMoCo(args))
    return trainer


def main() -> None:
    parser = common.flags(__doc__)
    parser.add_argument("--queue", type=int, default=1024, help="keys, of all ranks")
    parser.add_argument("--devices", type=int, default=1)
    trainer = train(parser.parse_args())
    if trainer.is_global_zero:
        print({name: float(value) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
