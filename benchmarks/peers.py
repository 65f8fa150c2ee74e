"""What the layer is compared with: other ways to batch norm, and what each of them should give."""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.kernels import reference, select

PLAIN, SPLIT, NAIVE = "nn.BatchNorm2d", "split-BN view", "naive torch"
IN_STEP = f"{PLAIN}, in step"
MODES = ("local", "swap", "regroup")


class Contestant(NamedTuple):
    """A layer, what gives the same with the reference kernels, and whether gradients do too."""

    layer: nn.Module
    truth: nn.Module
    gradient: bool = True


class SplitBatchNorm(nn.BatchNorm2d):
    """Virtual groups by a view: group ``n % groups`` of sample n gets channels of its own."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels)
        self.groups = groups
        self.register_buffer("running_mean", torch.zeros(channels * groups))
        self.register_buffer("running_var", torch.ones(channels * groups))

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        split = F.batch_norm(
            x.view(n // self.groups, channels * self.groups, height, width),
            self.running_mean, self.running_var,
            self.weight.repeat(self.groups), self.bias.repeat(self.groups),
            True, 0.1, self.eps,
        )  # fmt: skip
        return split.view(x.shape)


class Interleaved(nn.Module):
    """Puts sample n into group ``n % groups`` of a layer that takes groups in a row."""

    def __init__(self, layer: nn.Module, groups: int) -> None:
        super().__init__()
        self.layer, self.groups = layer, groups

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x), device=x.device).view(-1, self.groups).T.flatten()
        y: Tensor = self.layer(x[order])
        return y[torch.argsort(order)]


class NaiveBatchNorm(nn.BatchNorm2d):
    """The formula in plain torch, differentiated by autograd."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), 0.1)
            self.running_var.lerp_(var.flatten(), 0.1)
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        return ((x - mean) * torch.rsqrt(var + self.eps) * weight + bias).to(x.dtype)


class ThreeGathers(nn.BatchNorm2d):
    """The seed's pattern: every rank gets all statistics by three all_gathers, and takes one."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ThreeGathers.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return y


class _ThreeGathers(torch.autograd.Function):
    """aten's batch norm with the next rank's statistics; its gradient stays on this rank."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        count = mean.new_full((1,), x.numel() / x.shape[1])
        mean, var, _ = (_of_next_rank(row) for row in (mean, var, count))
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, mean, inverse_std = ctx.saved_tensors
        grads = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inverse_std, True, ctx.eps, [True] * 3
        )
        return *grads, None


def _of_next_rank(row: Tensor) -> Tensor:
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return rows[(dist.get_rank() + 1) % len(rows)]


class InStepBatchNorm(nn.BatchNorm2d):
    """Plain batch norm that gets one number from the next rank, in each direction, and ignores it.

    What waiting for a peer costs, by the call that `swap` makes, with nothing to send.
    """

    def forward(self, x: Tensor) -> Tensor:
        met: Tensor = _Meet.apply(x)  # type: ignore[no-untyped-call]
        return super().forward(met)


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):  # type: ignore[no-untyped-def]
        return _met(x)

    @staticmethod
    def backward(_ctx, dy):  # type: ignore[no-untyped-def]
        return _met(dy)


def _met(x: Tensor) -> Tensor:
    number, size, rank = x[0, 0, 0, :1].clone(), dist.get_world_size(), dist.get_rank()
    received = torch.empty_like(number)
    to, come = ([int(k == (rank + step) % size) for k in range(size)] for step in (-1, 1))
    dist.all_to_all_single(received, number, come, to)
    # A compiler leaves out what nobody reads; and it makes this part of another loop.
    return x + 0.0 * received if torch.compiler.is_compiling() else x.view_as(x)


def contestants(
    channels: int, groups: list[int], *, channels_last: bool, on_cuda: bool, compiled: bool
) -> dict[str, Contestant]:
    """All that can run here, `PLAIN` first; compiled: it, and it and the modes compiled."""

    def ours(mode: str, count: int) -> Contestant:
        options = dict(mode=mode, groups=count)
        return Contestant(*(ShuffleBatchNorm(channels, **options) for _ in "12"))  # type: ignore[arg-type]

    on_ranks = dist.is_initialized() and dist.get_world_size() > 1
    modes = ("local", "swap", "regroup", "sync") if on_ranks else MODES
    mine = {f"{mode}, groups={count}": ours(mode, count) for mode in modes for count in groups}
    plain = ours("local", 1).truth
    found = {PLAIN: Contestant(nn.BatchNorm2d(channels), plain)}
    if compiled:
        for name, (layer, truth, _) in {
            PLAIN: Contestant(nn.BatchNorm2d(channels), plain),
            **mine,
        }.items():
            # Not layer.compile(), which skips a module of torch's own.
            run: Any = torch.compile(layer, fullgraph=True, dynamic=False)
            found[f"{name}, compiled"] = Contestant(run, truth)
        return found
    found |= mine
    if on_ranks:
        found["three all_gathers"] = Contestant(
            ThreeGathers(channels), ours("swap", 1).truth, gradient=False
        )
        if on_cuda:
            found["nn.SyncBatchNorm"] = Contestant(
                nn.SyncBatchNorm(channels), ours("sync", 1).truth
            )
        return found
    for count in groups:
        if count > 1 and not channels_last:
            truth = Interleaved(ours("local", count).truth, count)
            found[SPLIT] = Contestant(SplitBatchNorm(channels, count), truth)
    return found | {NAIVE: Contestant(NaiveBatchNorm(channels), plain)}


def check(name: str, contestant: Contestant, x: Tensor, dy: Tensor) -> None:
    """Raise unless a contestant's output and gradients are the reference's.

    No speed is reported of what is wrong.
    """
    with mock.patch.object(select, "select", return_value=reference):
        want = _results(contestant.truth, x, dy)
    got = _results(contestant.layer, x, dy)
    tolerance = 2e-4 if x.dtype == torch.float32 else 3e-2
    compared = want if contestant.gradient else want[:1]
    for what, mine, true in zip(("output", "dx", "dw", "db"), got, compared, strict=False):
        error = float((mine.float() - true.float()).abs().max() / true.float().abs().max())
        if not error <= tolerance:
            raise RuntimeError(
                f"{name}: {what} of {tuple(x.shape)} is off by {error:.1e} of the largest value"
            )


def _results(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    grads = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def staged(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[Callable[[], None]], None]:
    """A run of `layer` in two stages, forward and backward."""
    leaf = x.detach().requires_grad_()

    def run(lap: Callable[[], None]) -> None:
        leaf.grad = None
        layer.zero_grad()
        y = layer(leaf)
        lap()
        y.backward(dy)
        lap()

    return run
