"""Hugging Face's Trainer: a converted model learns what a plain loop and one process learn."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from integrations import stack
from integrations.hugging_face import started_by_accelerate
from ranks import run_on_ranks

transformers = pytest.importorskip("transformers")


class Model(nn.Module):
    """What Trainer asks of a model: named inputs, a loss among the outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        self.outputs.append(y.detach())
        return {"loss": stack.loss_of(y), "y": y}


def _trained(mode: str, folder: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    size = dist.get_world_size() if dist.is_initialized() else 1
    model = Model(stack.model(mode, stack.GROUPS))
    # Trainer deals batches to the ranks in turn.
    samples = [{"x": x} for step in range(stack.STEPS) for x in stack.data(step, size)]
    with started_by_accelerate():
        arguments = transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            logging_strategy="no", train_sampling_strategy="sequential", max_steps=stack.STEPS,
            per_device_train_batch_size=stack.BATCH, max_grad_norm=0, ddp_broadcast_buffers=False,
            dataloader_pin_memory=False, lr_scheduler_type="constant",
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        transformers.Trainer(
            model, arguments, train_dataset=samples, optimizers=(optimizer, None)
        ).train()
    return model.outputs, dict(model.net.state_dict())


@pytest.mark.parametrize("mode", ["sync", "regroup"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_trainer(world_size: int, mode: str, tmp_path: Path) -> None:
    if world_size == 1:
        results = [_trained(mode, tmp_path)]
    else:
        results = run_on_ranks(world_size, _trained, mode, tmp_path)
    stack.check(results, mode)
