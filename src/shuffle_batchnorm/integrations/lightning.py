"""ShuffleBatchNorm under Lightning: a callback, and a plugin in the place of ``sync_batchnorm``."""

import difflib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from shuffle_batchnorm.comm.world import ProcessGroupLike
from shuffle_batchnorm.norm.contexts import synchronize_running_stats
from shuffle_batchnorm.norm.modules import ShuffleBatchNorm
from shuffle_batchnorm.shuffle.state import get_shuffle_state, set_shuffle_state

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import LayerSync
else:

    def _base(module: str, name: str) -> type:
        """Return a subclass of that class in each of Lightning's two packages, where installed."""
        found, error = [], None
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                found.append(getattr(import_module(f"{package}.{module}"), name))
            except ImportError as missing:
                error = error or missing
        if not found:
            raise ImportError(
                f"{__name__} needs Lightning: pip install lightning (or pytorch-lightning)"
            ) from error
        return type(found[0])(name, tuple(found), {})

    Callback, LayerSync = _base("callbacks", "Callback"), _base("plugins", "LayerSync")


class _Conversion:
    """Which submodules of a LightningModule are converted, and how."""

    def __init__(
        self,
        *submodules: str,
        process_group: ProcessGroupLike = None,
        mode: str = "regroup",
        **options: Any,
    ) -> None:
        self._names = submodules
        self._process_group = process_group
        self._options = {"mode": mode, **options}

    def _convert(self, model: nn.Module, group: ProcessGroupLike) -> nn.Module:
        if _is_sharded(model) and self._count(model)[0]:  # by an earlier fit, which left them
            return model
        convert = partial(
            ShuffleBatchNorm.convert_shuffle_batchnorm, process_group=group, **self._options
        )
        return self._replace(model, convert)

    def _revert(self, model: nn.Module) -> nn.Module:
        return self._replace(model, ShuffleBatchNorm.revert_shuffle_batchnorm)

    def _replace(self, model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        for name, module in list(self._named(model)):
            new = change(module)
            if new is not module:  # it is a batch norm itself
                model.set_submodule(name, new)
        return model

    def _named(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name in self._names or ("",):
            try:
                yield name, model.get_submodule(name)
            except AttributeError:
                known = [known for known, _ in model.named_modules() if known]
                near = difflib.get_close_matches(name, known) or list(dict(model.named_children()))
                raise ValueError(
                    f"shuffle_batchnorm: {type(model).__name__} has no submodule {name!r} yet; "
                    f"near names: {', '.join(near)}. What is built in setup or configure_model "
                    "comes too late for the callback: convert it there"
                ) from None

    def _count(self, model: nn.Module) -> tuple[int, int]:
        """Return how many batch norms of the named submodules are shuffled, and how many not."""
        modules = {m for _, named in self._named(model) for m in named.modules()}
        shuffled = sum(isinstance(m, ShuffleBatchNorm) for m in modules)
        return shuffled, sum(isinstance(m, _BatchNorm) for m in modules) - shuffled


class ShuffleBatchNormCallback(_Conversion, Callback):
    """Train with ShuffleBatchNorm in place of the batch norms of a LightningModule.

    Converts when ``fit`` begins, before the strategy wraps the model, and reverts after it, also
    after an exception. What FSDP or ``fully_shard`` has sharded stays converted; in eval mode it
    is ``nn.BatchNorm``. Before each validation and at the end of each training epoch, before
    checkpoints are written there, it averages the running statistics of the named submodules over
    all ranks. The shuffle's state (`get_shuffle_state`) goes into checkpoints, so that a resumed
    run goes on with the same permutations.

    Communication: one all_reduce of the running statistics per epoch and per validation.

    Args:
        *submodules: qualified names in the LightningModule; none for the whole of it.
        process_group: as in `ShuffleBatchNorm`. None for all ranks; under ModelParallelStrategy
            for the ranks of its ``data_parallel`` dimension, since others see the same batch.
        mode: as in `ShuffleBatchNorm`. The default here is the mode for key encoders of any depth.
        **options: further ones of `ShuffleBatchNorm.convert_shuffle_batchnorm`.

    Raises:
        ValueError: at the start of fit: no submodule of a name.
        RuntimeError: at the start of fit: converted layers were replaced, as by
            ``Trainer(sync_batchnorm=True)``, or batch norm was built after the conversion.

    Example:
        >>> callback = ShuffleBatchNormCallback("encoder_k", groups=2)
        >>> trainer = Trainer(callbacks=[callback], max_epochs=1)  # doctest: +SKIP
    """

    _found: tuple[int, int] | None = None  # None outside of fit
    _group: ProcessGroupLike = None  # of the layers, known when fit begins

    @property
    def state_key(self) -> str:
        """Tell several of these callbacks in one Trainer apart."""
        return self._generate_state_key(submodules=self._names)

    @override
    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Convert, before the strategy wraps the model and before ``configure_model``."""
        if stage != "fit":
            return
        mesh = getattr(pl_module, "device_mesh", None)
        self._group = self._process_group
        if self._group is None and mesh is not None:
            self._group = mesh["data_parallel"]
        list(self._named(pl_module))  # raises before anything is converted
        self._found = 0, 0
        with warnings.catch_warnings():
            if not trainer.is_global_zero:  # rank 0 says it
                warnings.simplefilter("ignore")
            self._convert(pl_module, self._group)
        self._found = self._count(pl_module)

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Raise if something has put other batch norms beside or in place of the converted."""
        before, now = self._found or (0, 0), self._count(pl_module)
        if now[0] < before[0]:
            raise RuntimeError(
                f"ShuffleBatchNormCallback: {before[0] - now[0]} of {before[0]} converted layers "
                "were replaced before training began; leave out what else converts batch norm, "
                "such as Trainer(sync_batchnorm=True)"
            )
        if now[1] > before[1]:
            raise RuntimeError(
                f"ShuffleBatchNormCallback: {now[1] - before[1]} batch norm layers were built "
                "after this callback's setup, in setup or configure_model of the LightningModule; "
                "build them in __init__, or convert them there, before anything shards them"
            )

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Average the running statistics over the ranks."""
        self._average(pl_module)

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Average the running statistics over the ranks, before ModelCheckpoint writes them."""
        self._average(pl_module)

    def _average(self, pl_module: "LightningModule") -> None:
        if self._found is not None:
            for _, module in self._named(pl_module):
                synchronize_running_stats(module)

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Revert after fit."""
        self._finish(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Revert after a fit that failed or was interrupted."""
        self._finish(trainer, pl_module)

    def _finish(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._found is not None and not _is_sharded(trainer.model):
            self._revert(pl_module)
        self._found = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the shuffle's state of all ranks and of the layers' group."""
        states = [get_shuffle_state(group) for group in (None, self._group)]
        return {"shuffle_states": states} if any(states) else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let a resumed fit go on with the shuffle's state; leave it alone in other stages."""
        if self._found is not None:
            for group, state in zip((None, self._group), state_dict["shuffle_states"], strict=True):
                set_shuffle_state(state, group)


class ShuffleBatchNormSync(_Conversion, LayerSync):
    """The conversion as a plugin, in the slot of ``Trainer(sync_batchnorm=True)``.

    Lightning refuses the two together. It applies this to the model as ``configure_model`` left it,
    under DDP and FSDP alone; see `lightning_callbacks` for the warning under other strategies. It
    converts and reverts, and does nothing else that `ShuffleBatchNormCallback` does.

    Args:
        *submodules: as in `ShuffleBatchNormCallback`.
        process_group: as in `ShuffleBatchNorm`.
        mode: as in `ShuffleBatchNormCallback`.
        **options: as in `ShuffleBatchNormCallback`.

    Raises:
        ValueError: when applied: no submodule of a name.
    """

    exists = False  # in this process

    def __init__(self, *submodules: str, **options: Any) -> None:
        super().__init__(*submodules, **options)
        ShuffleBatchNormSync.exists = True

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the named submodules."""
        return self._convert(model, self._process_group)

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        """Revert them, unless they are sharded."""
        return model if _is_sharded(model) else self._revert(model)

    def warn_unless_applied(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Warn if no layer is converted at the start of fit."""
        if trainer.is_global_zero and self._count(pl_module)[0] == 0:
            warnings.warn(
                "ShuffleBatchNormSync: no layer was converted, so nothing is shuffled in this fit: "
                f"Lightning does not apply this plugin under {type(trainer.strategy).__name__}; "
                "callbacks=[ShuffleBatchNormCallback(...)] converts under every strategy",
                stacklevel=2,
            )


class PluginWatch(Callback):
    """Asks the plugin at the start of fit, since Lightning tells a plugin nothing then."""

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Let the Trainer's plugin, if it is ours, warn that it was not applied."""
        plugin = trainer._accelerator_connector._layer_sync
        if isinstance(plugin, ShuffleBatchNormSync):
            plugin.warn_unless_applied(trainer, pl_module)


def _is_sharded(model: nn.Module | None) -> bool:
    kinds = (FSDPModule, FullyShardedDataParallel)
    return model is not None and any(isinstance(m, kinds) for m in model.modules())
