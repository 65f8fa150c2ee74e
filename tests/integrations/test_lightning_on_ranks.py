"""Lightning on two ranks of gloo: equal to one process, resumed, and told what goes wrong."""

import inspect
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from typing_extensions import override

from integrations.lightning_fits import (
    GROUPS,
    PLAIN,
    SHUFFLED,
    Batches,
    Net,
    build,
    ignore_lightnings_own,
    kinds,
    states,
    trainer,
)
from ranks import outcomes_on_ranks, run_on_ranks
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    set_shuffle_state,
    synchronize_running_stats,
)
from shuffle_batchnorm.integrations.lightning import (
    PluginWatch,
    ShuffleBatchNormCallback,
    ShuffleBatchNormSync,
)

EPOCHS = 2
# The first call imports Lightning in each process.
_run = partial(run_on_ranks, 2, timeout=200)
_outcomes = partial(outcomes_on_ranks, 2, timeout=200)


class Ranks(ClusterEnvironment):
    """The processes of `run_on_ranks`, whose group exists already."""

    creates_processes_externally = True
    main_address, main_port = "", 0

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    local_rank = global_rank

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


class Float64(FSDPPrecision):
    """Leaves float64 as it is; Lightning's own knows 32 and 16 bits."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


class CpuFSDP(FSDPStrategy):
    """FSDP1 on the CPU: Lightning's own asks for a GPU."""

    def __init__(self) -> None:
        super().__init__(
            cluster_environment=Ranks(),
            precision_plugin=Float64(),
            auto_wrap_policy={nn.Sequential},
        )

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class FSDP2Net(Net):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for module in self.encoder, self.head:
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=mesh)


class ModelParallel(ModelParallelStrategy):
    def __init__(self) -> None:
        super().__init__(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
        self.cluster_environment = Ranks()


def _ddp() -> DDPStrategy:
    # Buffers that DDP broadcasts hold the statistics of rank 0's samples alone.
    known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DDPStrategy(cluster_environment=Ranks(), **options)


def _rank_batches() -> Batches:
    return Batches(dist.get_rank(), dist.get_world_size())


class Spy(pl.Callback):
    """Notes what is there in the middle of things; with the plugin, averages as it does not."""

    def __init__(self, average: bool) -> None:
        self.average = average

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.kinds = kinds(pl_module)
        groups = [m.process_group for m in pl_module.modules() if isinstance(m, ShuffleBatchNorm)]
        self.dims = {None if group is None else group.mesh_dim_names for group in groups}

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated = {k: t for k, t in states(pl_module).items() if "running" in k}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.average:
            synchronize_running_stats(pl_module)
        if isinstance(trainer.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(trainer.model):
                self.end = states(pl_module)
        else:
            self.end = states(pl_module)


def _fit(kind: str) -> tuple[Any, ...]:
    """Fit on this rank under a strategy; what was there before, in and after it."""
    ignore_lightnings_own()
    name, *rest = kind.split()
    strategies = {"ddp": _ddp, "fsdp1": CpuFSDP, "fsdp2": ModelParallel}
    model = FSDP2Net() if name == "fsdp2" else Net()
    size, spy = dist.get_world_size(), Spy(average="plugin" in rest)
    kind_of_ours = ShuffleBatchNormSync if spy.average else ShuffleBatchNormCallback
    ours = kind_of_ours(groups=GROUPS // size)
    fit = trainer(
        *([spy] if spy.average else [ours, spy]), epochs=EPOCHS, devices=size,
        strategy=strategies[name](), plugins=[ours] if spy.average else None,
    )  # fmt: skip
    fit.fit(model, _rank_batches(), _rank_batches())
    return spy.end, spy.validated, spy.kinds, spy.dims, kinds(model)


def _reference(fits: int = 1, epochs: int = EPOCHS) -> dict[str, Tensor]:
    """Train in one process, in plain torch, with all samples in one batch."""
    model = nn.ModuleDict(build())
    ShuffleBatchNorm.convert_shuffle_batchnorm(model, mode="regroup", groups=GROUPS)
    for _ in range(fits):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in list(Batches()) * epochs:
            optimizer.zero_grad()
            F.mse_loss(model["head"](model["encoder"](x)), y).backward()
            optimizer.step()
    return states(model)


@pytest.mark.parametrize("kind", ["ddp", "ddp plugin", "fsdp1", "fsdp1 plugin", "fsdp2"])
def test_two_ranks_equal_one_process(kind: str) -> None:
    expected = _reference()
    for end, validated, inside, dims, after in _run(_fit, kind):
        torch.testing.assert_close(end, expected, rtol=1e-10, atol=1e-10)
        assert inside == [SHUFFLED] * 3
        # What is sharded stays as it is; the group is that of the ranks with other samples.
        assert after == ([SHUFFLED] * 3 if "fsdp" in kind else [PLAIN] * 3)
        assert dims == {("data_parallel",) if kind == "fsdp2" else None}
        if "plugin" not in kind:
            running = {name: expected[name] for name in validated}
            torch.testing.assert_close(validated, running, rtol=1e-10, atol=1e-10)


def _fit_twice() -> dict[str, Tensor]:
    """Fit, test and fit a model that FSDP2 shards in the first fit."""
    ignore_lightnings_own()
    model, callback = FSDP2Net(), ShuffleBatchNormCallback(groups=GROUPS // 2)
    for _ in range(2):
        fit = trainer(callback, devices=2, strategy=ModelParallel())
        fit.fit(model, _rank_batches(), _rank_batches())
        fit.test(model, _rank_batches(), verbose=False)
    assert kinds(model) == [SHUFFLED] * 3
    return states(model)


def test_a_sharded_model_is_converted_once() -> None:
    """Catches layers replaced under FSDP, which goes on with the parameters of the old ones."""
    expected = _reference(fits=2, epochs=1)
    for got in _run(_fit_twice):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def _fit_with_a_plugin_alone() -> str:
    ignore_lightnings_own()
    plugins = [ShuffleBatchNormSync()]
    fit = trainer(PluginWatch(), devices=2, strategy=ModelParallel(), plugins=plugins)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(FSDP2Net(), _rank_batches(), _rank_batches())
    return "\n".join(str(warning.message) for warning in caught)


def test_a_plugin_that_was_not_applied_is_noticed() -> None:
    text = "does not apply this plugin under ModelParallel;"
    assert [text in found for found in _run(_fit_with_a_plugin_alone)] == [True, False]


class ShuffledNet(Net):
    """MoCo's way: samples move, among virtual groups that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ShuffledEncoder(self.encoder)


def _fit_in_part(folder: Path, epochs: int, resume: bool) -> dict[str, Tensor]:
    ignore_lightnings_own()
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty")
    set_shuffle_state((7, 0) if not resume else (99, 5))  # the latter is to be replaced
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit = trainer(
        ShuffleBatchNormCallback("encoder", mode="local", groups=2), saving, epochs=epochs,
        devices=2, strategy=_ddp(), enable_checkpointing=True, limit_val_batches=0,
    )  # fmt: skip
    model = ShuffledNet()
    start = folder / "epoch=0.ckpt" if resume else None
    fit.fit(model, _rank_batches(), _rank_batches(), ckpt_path=start)
    return states(model)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Without validation. Catches other permutations, and rank 0's statistics in a checkpoint."""
    expected = _run(_fit_in_part, tmp_path / "whole", 2, False)
    _run(_fit_in_part, tmp_path / "parts", 1, False)
    resumed = _run(_fit_in_part, tmp_path / "parts", 2, True)
    for got, wanted in zip(resumed, expected, strict=True):
        # Not those of the head, which the callback leaves alone.
        same = [name for name in wanted if "head.2.running" not in name]
        torch.testing.assert_close([got[n] for n in same], [wanted[n] for n in same])


def _fit_with_sync_batchnorm() -> None:
    ignore_lightnings_own()
    callback = ShuffleBatchNormCallback("encoder", groups=GROUPS // 2)
    # Under DDP torch refuses SyncBatchNorm on the CPU by itself.
    fit = trainer(callback, devices=2, strategy=CpuFSDP(), sync_batchnorm=True)
    with pytest.warns(UserWarning, match="convert_sync_batchnorm replaces ShuffleBatchNorm layers"):
        fit.fit(Net(), _rank_batches(), _rank_batches())


def test_sync_batchnorm_and_the_callback_are_refused() -> None:
    """Catches layers that Lightning replaces by SyncBatchNorm after they were converted."""
    for error in _outcomes(_fit_with_sync_batchnorm):
        assert isinstance(error, RuntimeError)
        assert "2 of 2 converted layers were replaced before training began" in str(error)
        assert "such as Trainer(sync_batchnorm=True)" in str(error)


class DeepNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.extend(nn.BatchNorm1d(4).double() for _ in range(8))  # type: ignore[operator]


def _count_warnings() -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = ShuffleBatchNormCallback("encoder", mode="swap", groups=GROUPS // 2)
        fit = trainer(callback, devices=2, strategy=_ddp())
        fit.fit(DeepNet(), _rank_batches(), _rank_batches())
    return sum("10 layers in mode 'swap'" in str(warning.message) for warning in caught)


def test_one_rank_passes_on_a_warning_of_the_conversion() -> None:
    assert _run(_count_warnings) == [1, 0]
