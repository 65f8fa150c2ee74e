"""ShuffleBatchNorm, the layer, and its conversion from and to others."""

import copy
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.batchnorm import _BatchNorm

from shuffle_batchnorm.comm.recomputation import Forwards
from shuffle_batchnorm.comm.world import ProcessGroupLike, check_process_group

from .checks import Parameters, check_input, warn_of_few_groups
from .convert import FilterFn, convert, revert
from .functional import Calls, kind_of, normalise
from .mixing import CALL, Options, check_options
from .statistics import StatisticsRecord, own_statistics
from .tracing import LEAF, ReplacementWarning, refuse_to


class ShuffleBatchNorm(_BatchNorm):
    r"""Batch normalisation with another group's statistics, so that none is a signature.

    .. math:: y = \frac{x - \mu_S}{\sqrt{\sigma_S^2 + \epsilon}} \cdot \gamma + \beta

    S, the group that normalises a sample, follows from the mode; see `shuffle_batch_norm` for the
    formula, the communication and the gradient. Parameters, buffers and ``state_dict`` are those
    of ``nn.BatchNorm1d/2d/3d``. In eval mode it is that layer too, without communication.

    =========== ===================================== =======================================
    mode        a sample is normalised by             is
    =========== ===================================== =======================================
    ``local``   its own group                         ``nn.BatchNorm``, per virtual group
    ``sync``    all samples of all ranks              ``nn.SyncBatchNorm``, on the CPU as well
    ``swap``    the group `offset` further            shuffled statistics; for shallow networks
    ``regroup`` a group dealt from B other groups     MoCo's Shuffling BN, no sample moved
    =========== ===================================== =======================================

    .. warning::
        ``swap`` lets the scale of activations grow like 2 to the power of the depth. Networks with
        8 or more of these layers want ``mode="regroup"``.

    A forward that an activation checkpoint repeats communicates again and leaves the running
    statistics alone, unless they were not tracked the first time. Double backward raises.

    Args:
        num_features: number of channels, C.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; None for their cumulative average.
        affine: learn weight and bias.
        track_running_stats: keep running statistics for eval mode.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn a bias besides the weight.
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
        bias: bool = True,
        mode: str = "swap",
        groups: int = 1,
        offset: int = 1,
        blocks: int = 8,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)  # torch before 2.13 has no argument for it
        self._configure(process_group, Options(mode, groups, offset, blocks))
        self._forget()

    # Of a converted layer: the class before and its process group; whether `drop` and `act` follow;
    # a list that all layers of a conversion share, empty after the first training call of one.
    _former: tuple[type[_BatchNorm], ProcessGroupLike] | None = None
    _is_followed = False
    _new: list[None] | tuple[()] = ()

    def _configure(self, process_group: ProcessGroupLike, options: Options) -> None:
        check_options(type(self).__name__, options)
        check_process_group(type(self).__name__, process_group)
        self.process_group = process_group
        self.mode, self.groups, self.offset, self.blocks = options

    def _forget(self) -> None:
        """Drop what belongs to this very object in this process, not to the model."""
        self._calls: Calls = {}
        self._forwards = Forwards()
        self.__dict__["__module__"] = LEAF
        self._sinks: list[tuple[str, list[StatisticsRecord]]] = []

    def reset_parameters(self) -> None:
        """Reset weight, bias and running statistics, as ``nn.BatchNorm`` does."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[N, C, *]``. See the class."""
        output = self._train(input) if self.training else self._evaluate(input)
        if self._is_followed:
            for name in ("drop", "act"):
                output = self._modules[name](output)  # type: ignore[misc]
        return output

    def _train(self, input: Tensor) -> Tensor:
        """Normalise with batch statistics, and move the running ones."""
        options = Options(self.mode, self.groups, self.offset, self.blocks)
        # As in nn.BatchNorm, the attribute can be switched off after the buffers were made.
        tracked, repeats = self.track_running_stats, False
        if torch.compiler.is_compiling():
            if self._former is not None:
                warn_of_few_groups(options, self.process_group)
        else:
            if self._new and self.offset:
                self._new.clear()
                warn_of_few_groups(options, self.process_group)
            tracked, repeats = self._forwards.begin(kind_of(input), tracked)
        weight, bias, *buffers = self._tensors()
        mean, var, number = buffers if tracked else (None, None, None)
        step = self._cumulative_step() if self.momentum is None else self.momentum
        result = normalise(
            input, Parameters(weight, bias, mean, var), number, step, self.eps, options,
            self.process_group, self._calls, self.num_features, self._check_dimensions,
        )  # fmt: skip
        if self._sinks and not repeats:
            mean, std = result.per_sample(input)
            self._record(input, mean, std.square())
        return result.output

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Return weight, bias, running mean and variance, and the number of batches."""
        parameters, buffers = self._parameters, self._buffers
        names = "running_mean", "running_var", "num_batches_tracked"
        try:  # what nn.Module's look-up would find, in less time
            return parameters["weight"], parameters["bias"], *[buffers[name] for name in names]
        except KeyError:  # of a parametrized weight, or one that FSDP has put there
            return tuple(getattr(self, name) for name in ("weight", "bias", *names))

    def _cumulative_step(self) -> float | Tensor:
        """Return the share of this batch in a cumulative average, as ``nn.BatchNorm`` does."""
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
        check_input(input, parameters, 1, self.num_features, self._check_dimensions)

    def _check_dimensions(self, input: Tensor) -> None:
        """Raise a ValueError if the class that this layer stands for takes no such input."""
        if self._former is None:
            return
        former, _ = self._former
        try:
            former._check_input_dim(self, input)
        except ValueError as error:
            raise ValueError(
                f"{CALL}: {error}, as {former.__name__}, which this layer was "
                f"(input shape {tuple(input.shape)})"
            ) from None

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
        filter_fn: FilterFn | None = None,
    ) -> nn.Module:
        """Replace every BatchNorm in a model by a ShuffleBatchNorm.

        The new layers share parameters, buffers and hooks with the old ones, so an optimizer made
        before stays valid, and keep ``training``, device and dtype. They take input of as many
        dimensions as the old ones. A layer that is a ShuffleBatchNorm already gets the new options.

        A subclass is converted if it defines ``__init__`` alone, or if it is batch norm followed
        by its submodules ``drop`` and ``act``, as timm's ``BatchNormAct2d``.

        Args:
            module: a model with ``nn.BatchNorm1d/2d/3d`` or ``nn.SyncBatchNorm``, or such a layer.
            process_group: as in the class.
            mode: as in the class.
            groups: as in the class.
            offset: as in the class.
            blocks: as in the class.
            filter_fn: ``filter_fn(module, qualified_name) -> bool``, asked for every BatchNorm:
                whether to convert it. A layer left out stays as it is.

        Returns:
            `module` with its layers replaced; a new layer if `module` is a BatchNorm itself.

        Raises:
            TypeError: a subclass of BatchNorm with its own behaviour, a lazy or a parametrized one,
                or one in a model that ``fully_shard`` or FullyShardedDataParallel has wrapped; the
                model is left as it was.

        Warns:
            UserWarning: no layer was converted; or 8 or more get mode ``swap``, whose activations
                grow with depth. At the first training call: ``swap`` or ``regroup`` has a single
                group, so nothing is shuffled; or ``regroup`` has fewer than 8 across ranks.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            >>> model = ShuffleBatchNorm.convert_shuffle_batchnorm(model, mode="regroup")
            >>> type(model[1]).__name__
            'ShuffleBatchNorm'
        """
        options = Options(mode, groups, offset, blocks)
        check_options("convert_shuffle_batchnorm", options)
        check_process_group("convert_shuffle_batchnorm", process_group)
        new: list[None] = [None]

        def configure(layer: ShuffleBatchNorm) -> None:
            layer._configure(process_group, options)
            layer._new = new
            if "_calls" not in layer.__dict__:
                layer._forget()

        return convert(module, cls, ShuffleBatchNorm, configure, mode, filter_fn)

    @classmethod
    def revert_shuffle_batchnorm(
        cls, module: nn.Module, *, filter_fn: FilterFn | None = None
    ) -> nn.Module:
        """Undo `convert_shuffle_batchnorm`: restore the original classes.

        Parameters, buffers and hooks stay shared, so the statistics learnt since then remain. A
        layer constructed as a ShuffleBatchNorm has no former class and stays as it is.

        Args:
            module: a converted model or layer.
            filter_fn: as in `convert_shuffle_batchnorm`; a layer left out stays converted.

        Returns:
            `module` with its layers replaced; a new layer if `module` is one itself.

        Raises:
            TypeError: a parametrized layer, or one in a model that ``fully_shard`` or
                FullyShardedDataParallel has wrapped; the model is left as it was.
        """
        return revert(module, cls, cls._OWN_ATTRIBUTES, filter_fn)

    qconfig = ReplacementWarning()  # which nobody has set
    _TRANSIENT = ("_calls", "_forwards", "_sinks", "__module__")
    _OWN_ATTRIBUTES = ("process_group", "mode", "groups", "offset", "blocks", "_new", *_TRANSIENT)

    def _replicate_for_data_parallel(self) -> Self:
        if self.training:
            refuse_to("nn.DataParallel", "in training mode its copies share no statistics; use "
                      "DistributedDataParallel, one process per device")  # fmt: skip
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call, no-any-return]

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            refuse_to("torch.jit.trace", "in training mode its output depends on other ranks")
        return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_to("torch.jit.script", "it compiles no communication between ranks")

    def __getstate__(self) -> dict[str, Any]:
        return self._portable_state()

    def _portable_state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # MoCo's key encoder is a deep copy; a process group can't be copied, and need not be.
        _, former_group = self._former or (None, None)
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
