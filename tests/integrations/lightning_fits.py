"""A small LightningModule, data, and Trainers that write nothing and show nothing."""

import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as new
import pytorch_lightning as old
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
STEPS = 2  # per epoch
SAMPLES, GROUPS = 32, 8  # of all ranks together; fewer groups are worth a warning


class Batches:
    """Batches in a fixed order: no loader, so no workers and no sampler of Lightning's."""

    def __init__(self, part: int = 0, parts: int = 1) -> None:
        """Hold this part of each batch."""
        draw = torch.Generator().manual_seed(3)
        x = torch.randn(STEPS, SAMPLES, 3, 2, generator=draw, dtype=torch.float64)
        y = torch.randn(STEPS, SAMPLES, 1, generator=draw, dtype=torch.float64)
        self.batches = [
            tuple(t.chunk(parts)[part] for t in pair) for pair in zip(x, y, strict=True)
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return STEPS


def build() -> dict[str, nn.Module]:
    """Return an encoder with a batch norm in it and one as a module of its own, and a head."""
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU())
    encoder = nn.Sequential(stem, nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return {"encoder": encoder.double(), "head": head.double()}


class Steps(nn.Module):
    """What is Lightning's about the model, for the LightningModule of either package."""

    encoder: nn.Module
    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        for name, module in build().items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out

    def training_step(self, batch: Batch) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Batch) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Net(Steps, new.LightningModule):
    pass


class OldNet(Steps, old.LightningModule):
    pass


def trainer(*callbacks: Any, package: Any = new, epochs: int = 1, **options: Any) -> Any:
    """Return a Trainer of one of the packages, on the CPU, without files and without bars."""
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False
    )
    options = {"devices": 1, "enable_checkpointing": False, **options}
    return package.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet, **options
    )


def ignore_lightnings_own() -> None:
    """Ignore what Lightning brings on itself with this torch."""
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)


def states(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of parameters and buffers, by the names they have without wrappers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    full = {name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for name, t in named}
    return {name.replace("_fsdp_wrapped_module.", ""): t for name, t in full.items()}


def kinds(model: nn.Module) -> list[str]:
    """Return the classes of the three batch norms."""
    return [type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__]


SHUFFLED, PLAIN = "ShuffleBatchNorm", "BatchNorm1d"
