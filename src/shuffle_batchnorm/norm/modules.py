"""ShuffleBatchNorm, the layer, and its conversion from and to others."""

import copy
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shuffle_batchnorm.comm.recomputation import is_recomputation
from shuffle_batchnorm.comm.world import ProcessGroupLike, check_process_group

from .checks import Parameters, check_input
from .convert import convert, revert
from .functional import Calls, normalise
from .mixing import Options, check_options
from .statistics import own_statistics, per_sample_statistics


class StatisticsRecord(NamedTuple):
    """The statistics of one call of one layer, each ``[N, C]``, one row per sample.

    Attributes:
        name: the layer's name in the module given to `record_statistics`.
        own_mean: mean of the sample's own group.
        own_var: biased variance of the sample's own group.
        used_mean: mean that normalised the sample.
        used_var: biased variance that normalised it; in eval mode the running variance.
    """

    name: str
    own_mean: Tensor
    own_var: Tensor
    used_mean: Tensor
    used_var: Tensor


class ShuffleBatchNorm(_BatchNorm):
    r"""Batch normalisation with another group's statistics, so that none is a signature.

    .. math:: y = \frac{x - \mu_S}{\sqrt{\sigma_S^2 + \epsilon}} \cdot \gamma + \beta

    S, the group that normalises a sample, follows from the mode; see `shuffle_batch_norm` for the
    formula, the communication and the gradient. Parameters, buffers and ``state_dict`` are those
    of ``nn.BatchNorm1d/2d/3d``. In eval mode it is that layer too, without communication.

    ========== ===================================== ========================================
    mode       a sample is normalised by             is
    ========== ===================================== ========================================
    ``local``  its own group                         ``nn.BatchNorm``, per virtual group
    ``sync``   all samples of all ranks              ``nn.SyncBatchNorm``, on the CPU as well
    ``swap``   the group `offset` further            shuffled statistics; for shallow networks
    ``regroup`` a group dealt from B other groups    MoCo's Shuffling BN, no sample moved
    ========== ===================================== ========================================

    .. warning::
        ``swap`` lets the scale of activations grow like 2 to the power of the depth. Networks with
        8 or more of these layers want ``mode="regroup"``.

    A forward run again in the backward pass (activation checkpointing) communicates again and
    leaves the running statistics alone. Double backward raises.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; None for their cumulative average.
        affine: learn weight and bias.
        track_running_stats: keep running statistics for eval mode.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        mode: ``"local"``, ``"sync"``, ``"swap"`` or ``"regroup"``.
        groups: virtual groups per rank; divides the batch. More than 1 shuffles inside one device.
        offset: how many groups away the normaliser is; 0 turns shuffling off.
        blocks: largest number of blocks that ``regroup`` cuts a group into.

    Shape:
        Input and output ``[N, C, *]``.

    Raises:
        ValueError: an unknown mode, `groups` or `blocks` below 1; when called, see
            `shuffle_batch_norm`.

    Source:
        He et al. 2019, arXiv 1911.05722, section 3.3.

    Example:
        >>> layer = ShuffleBatchNorm(3, mode="regroup", groups=2)
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "swap",
        groups: int = 1,
        offset: int = 1,
        blocks: int = 8,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self._configure(process_group, Options(mode, groups, offset, blocks))

    def _configure(self, process_group: ProcessGroupLike, options: Options) -> None:
        check_options(type(self).__name__, options)
        check_process_group(type(self).__name__, process_group)
        self.process_group = process_group
        self.mode, self.groups, self.offset, self.blocks = options
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to this very object in this process, not to the model."""
        self._calls: Calls = {}
        self._sinks: list[tuple[str, list[StatisticsRecord]]] = []

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[N, C, *]``. See the class."""
        if not self.training:
            return self._evaluate(input)
        options = Options(self.mode, self.groups, self.offset, self.blocks)
        # As in nn.BatchNorm, the attribute can be switched off after the buffers were made.
        tracked = self.track_running_stats
        buffers = (self.running_mean, self.running_var) if tracked else (None, None)
        result = normalise(
            input, Parameters(self.weight, self.bias, *buffers), self._running_step(), self.eps,
            options, self.process_group, self._calls, self.num_features,
        )  # fmt: skip
        if is_recomputation():
            return result.output
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self._sinks:
            mean, std = per_sample_statistics(result.statistics, result.sizes)
            self._record(input, mean, std.square())
        return result.output

    def _running_step(self) -> float | Tensor:
        """Return the share of this batch in the running statistics, as ``nn.BatchNorm`` does."""
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            return 0.0
        return 1.0 / (self.num_batches_tracked + 1.0)

    def _evaluate(self, input: Tensor) -> Tensor:
        """Normalise with the running statistics; without any, with this rank's whole batch."""
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        untracked = mean is None or var is None
        output = F.batch_norm(input, mean, var, self.weight, self.bias, untracked, 0.0, self.eps)
        if self._sinks:
            if mean is None or var is None:
                mean, std = own_statistics(input.detach(), groups=1)
                var = std.square()
            size = (input.shape[0], -1)
            self._record(input, mean.expand(size), var.expand(size))
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        parameters = Parameters(self.weight, None, self.running_mean, self.running_var)
        check_input(input, parameters, groups=1, num_features=self.num_features)

    def _record(self, input: Tensor, used_mean: Tensor, used_var: Tensor) -> None:
        # Eval mode takes any batch; one that doesn't fit the groups is a single group.
        groups = 1 if input.shape[0] % self.groups else self.groups
        own_mean, own_std = own_statistics(input.detach(), groups)
        for name, records in self._sinks:
            records.append(
                StatisticsRecord(
                    name, own_mean, own_std.square(), used_mean.detach().clone(), used_var.clone()
                )
            )

    @classmethod
    def convert_shuffle_batchnorm(
        cls,
        module: nn.Module,
        process_group: ProcessGroupLike = None,
        *,
        mode: str = "swap",
        groups: int = 1,
        offset: int = 1,
        blocks: int = 8,
    ) -> nn.Module:
        """Replace every BatchNorm in a model by a ShuffleBatchNorm.

        The new layers share parameters, buffers and hooks with the old ones, so an optimizer made
        before stays valid, and keep ``training``, device and dtype. A layer that is a
        ShuffleBatchNorm already gets the new options.

        Args:
            module: a model with ``nn.BatchNorm1d/2d/3d`` or ``nn.SyncBatchNorm``, or such a layer.
            process_group: as in the class.
            mode: as in the class.
            groups: as in the class.
            offset: as in the class.
            blocks: as in the class.

        Returns:
            `module` with its layers replaced; a new layer if `module` is a BatchNorm itself.

        Raises:
            TypeError: a subclass of BatchNorm with its own behaviour, or a lazy one; the model is
                left as it was.

        Warns:
            UserWarning: 8 or more layers get mode ``swap``, whose activations grow with depth.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            >>> model = ShuffleBatchNorm.convert_shuffle_batchnorm(model, mode="regroup")
            >>> type(model[1]).__name__
            'ShuffleBatchNorm'
        """
        options = Options(mode, groups, offset, blocks)
        check_options("convert_shuffle_batchnorm", options)
        check_process_group("convert_shuffle_batchnorm", process_group)

        return convert(
            module, cls, lambda layer: layer._configure(process_group, options), options.mode
        )

    @classmethod
    def revert_shuffle_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Undo `convert_shuffle_batchnorm`: back to the classes that were there.

        Parameters, buffers and hooks stay shared, so the statistics learnt since then remain. A
        layer constructed as a ShuffleBatchNorm has no former class and stays as it is.

        Args:
            module: a converted model or layer.

        Returns:
            `module` with its layers replaced; a new layer if `module` is one itself.
        """
        return revert(module, cls, cls._OWN_ATTRIBUTES)

    _OWN_ATTRIBUTES = ("process_group", "mode", "groups", "offset", "blocks", "_calls", "_sinks")

    def __getstate__(self) -> dict[str, Any]:
        return self._portable_state()

    def _portable_state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_calls", "_sinks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # MoCo's key encoder is a deep copy; a process group can't be copied, and need not be.
        _, former_group = self.__dict__.get("_former", (None, None))
        for group in (self.process_group, former_group):
            memo[id(group)] = group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self._portable_state(), memo))
        return twin

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return (
            f"{super().extra_repr()}, "  # type: ignore[no-untyped-call]
            f"mode={self.mode!r}, groups={self.groups}, "
            f"offset={self.offset}, blocks={self.blocks}"
        )
