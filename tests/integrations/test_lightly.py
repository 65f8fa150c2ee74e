"""lightly's functions by name and signature: its MoCo trains as before, with one import changed."""

import copy
import inspect
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from integrations.torchvision_stub import torchvision_for_import
from ranks import outcomes_on_ranks, run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, batch_shuffle, set_shuffle_state
from shuffle_batchnorm.integrations import lightly as ours
from shuffle_batchnorm.shuffle.permutations import Key, samples_sent_to

with torchvision_for_import():
    pytest.importorskip("lightly")
    from lightly.loss import NTXentLoss
    from lightly.models import ResNetGenerator
    from lightly.models import utils as theirs
    from lightly.models.modules import MoCoProjectionHead


class MoCo(nn.Module):
    """MoCo of lightly's parts; `utils` is where it imports the shuffle from."""

    def __init__(self, utils: ModuleType, num_splits: int, distributed: bool) -> None:
        super().__init__()
        self.utils, self.distributed = utils, distributed
        self.backbone = ResNetGenerator("resnet-9", width=0.125, num_splits=num_splits)
        self.backbone.linear = nn.Identity()
        self.projection_head = MoCoProjectionHead(64, 32, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        theirs.deactivate_requires_grad(self.backbone_momentum)
        theirs.deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.projection_head(self.backbone(x).flatten(1))
        return features

    def forward_momentum(self, x: Tensor) -> Tensor:
        theirs.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        theirs.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        x, shuffle = self.utils.batch_shuffle(x, distributed=self.distributed)
        y = self.projection_head_momentum(self.backbone_momentum(x).flatten(1))
        keys: Tensor = self.utils.batch_unshuffle(y.detach(), shuffle, distributed=self.distributed)
        return keys


def _train(utils: ModuleType, num_splits: int, distributed: bool) -> tuple[list[float], Any]:
    """Two steps from one random state; the losses, and everything the model has become."""
    torch.manual_seed(3)
    set_shuffle_state((7, 0))
    model = MoCo(utils, num_splits, distributed).train()
    loss_of = NTXentLoss(temperature=0.2, memory_bank_size=(32, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank() if distributed else 0)
    losses = []
    for _ in range(2):
        view_1, view_2 = torch.randn(2, 6, 3, 32, 32)
        loss = loss_of(model(view_1), model.forward_momentum(view_2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [*model.state_dict().values(), loss_of.memory_bank.bank]


def test_moco_in_one_process_is_lightlys_to_the_bit() -> None:
    """Catches another random number drawn, and a shuffle that is not undone."""
    ((losses, state), (wanted, theirs_state)) = (
        _train(utils, 3, False) for utils in (ours, theirs)
    )
    assert losses == wanted
    torch.testing.assert_close(state, theirs_state, rtol=0, atol=0)


def _both_on_ranks() -> None:
    losses, state = _train(ours, 0, True)
    world = dist.get_world_size()
    orders = [
        torch.cat([samples_sent_to(rank, Key(7, step), [6] * world) for rank in range(world)])
        for step in range(2)
    ]
    with mock.patch.object(theirs.torch, "randperm", side_effect=orders):
        wanted, theirs_state = _train(theirs, 0, True)
    assert losses == wanted
    torch.testing.assert_close(state, theirs_state, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_moco_on_ranks_is_lightlys_with_the_same_permutation(world_size: int) -> None:
    """Catches rows that come back to another place, and statistics of unshuffled samples."""
    run_on_ranks(world_size, _both_on_ranks)


def test_the_signatures_are_lightlys() -> None:
    """Catches a renamed argument, and one that has become keyword-only."""
    for name in ("batch_shuffle", "batch_unshuffle"):
        mine, wanted = (inspect.signature(getattr(m, name)).parameters for m in (ours, theirs))
        assert list(mine) == list(wanted)
        for parameter in wanted:
            assert mine[parameter].kind == wanted[parameter].kind
            assert mine[parameter].default == wanted[parameter].default


def _round_trip(distributed: bool) -> Tensor:
    rank = dist.get_rank() if distributed else 0
    x = (torch.arange(12.0).view(6, 2) + 100 * rank).requires_grad_()
    shuffled, shuffle = ours.batch_shuffle(x, distributed)
    restored = ours.batch_unshuffle(shuffled * 2, shuffle, distributed)
    assert torch.equal(restored, x * 2)
    assert not shuffled.requires_grad
    assert not restored.requires_grad
    return shuffled


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_round_trip_takes_no_gradient(world_size: int) -> None:
    """Catches a graph that lightly has not, and rows lost on the way."""
    if world_size == 1:
        everything = _round_trip(False)
    else:
        everything = torch.cat(run_on_ranks(world_size, _round_trip, True))
    starts = sorted(everything[:, 0].tolist())
    assert starts == [100.0 * rank + 2 * i for rank in range(world_size) for i in range(6)]


def _local_on_ranks() -> list[float]:
    torch.manual_seed(dist.get_rank())
    x = torch.arange(6.0) + 10 * dist.get_rank()
    shuffled, shuffle = ours.batch_shuffle(x)
    assert torch.equal(ours.batch_unshuffle(shuffled, shuffle), x)
    return shuffled.tolist()


def test_without_distributed_samples_stay_on_their_rank() -> None:
    """Catches a shuffle over all ranks because there are some."""
    for rank, shuffled in enumerate(run_on_ranks(2, _local_on_ranks)):
        assert sorted(shuffled) == [10 * rank + i for i in range(6)]


def test_a_plan_without_distributed_is_refused() -> None:
    _, shuffle = ours.batch_shuffle(torch.randn(4, 2), distributed=True)
    with pytest.raises(TypeError) as caught:
        ours.batch_unshuffle(torch.randn(4, 2), shuffle)
    assert str(caught.value) == (
        "batch_unshuffle: shuffle comes from batch_shuffle(..., distributed=True); call "
        "batch_unshuffle(..., distributed=True)"
    )


def _an_index_with_distributed() -> None:
    _, shuffle = ours.batch_shuffle(torch.randn(4, 2))
    ours.batch_unshuffle(torch.randn(4, 2), shuffle, distributed=True)


def test_an_index_with_distributed_is_refused() -> None:
    for error in outcomes_on_ranks(2, _an_index_with_distributed):
        assert str(error) == (
            "batch_unshuffle: plan must be what batch_shuffle returned, got Tensor"
        )


def test_split_batch_norm_is_refused_by_name() -> None:
    """As the page says: it has statistics for every split, which no other layer can take over."""
    backbone = ResNetGenerator("resnet-9", width=0.125, num_splits=2)
    with pytest.raises(TypeError, match=r"lightly\.models\.batchnorm\.SplitBatchNorm"):
        ShuffleBatchNorm.convert_shuffle_batchnorm(backbone, mode="local", groups=2)


def test_the_librarys_own_call_refuses_lightlys_keyword() -> None:
    """It is another function: this module is the way for code that has the keyword."""
    with pytest.raises(TypeError, match="distributed"):
        batch_shuffle(torch.randn(4, 2), distributed=True)  # type: ignore[call-arg]
