"""Running statistics move once per forward of the user's, whatever repeats it in a backward."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, record_statistics, shuffle_batch_norm

MODES = pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


def _net(mode: str = "regroup", momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (ShuffleBatchNorm(4, momentum=momentum, mode=mode, groups=2) for _ in range(2))
    first, second = layers
    return nn.Sequential(nn.Linear(3, 4), first, nn.Tanh(), second).double()


def _images(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(8, 3, dtype=torch.float64, requires_grad=True)


def _counts(net: nn.Module) -> list[int]:
    return [int(b) for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]


def _assert_same(got: nn.Module, want: nn.Module) -> None:
    for (name, g), w in zip(got.named_buffers(), want.buffers(), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12, msg=name)
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=name)


class Suspending:
    """Suspends tracking where no gradient is wanted, as fairscale's `patch_batchnorm` does."""

    def __init__(self, net: nn.Module) -> None:
        for layer in net.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_pre_hook(self._suspend)
                layer.register_forward_hook(self._resume)

    def _suspend(self, layer: Any, _inputs: Any) -> None:
        layer.tracked = layer.track_running_stats
        layer.track_running_stats &= torch.is_grad_enabled()

    def _resume(self, layer: Any, _inputs: Any, _output: Any) -> None:
        layer.track_running_stats = layer.tracked


def _plain(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)  # type: ignore[no-any-return]


def _checkpointed(net: nn.Module, x: Tensor, use_reentrant: bool) -> Tensor:
    return checkpoint(net, x, use_reentrant=use_reentrant)  # type: ignore[no-any-return]


def _nested(net: nn.Module, x: Tensor, outer: bool, inner: bool) -> Tensor:
    return checkpoint(  # type: ignore[no-any-return]
        lambda y: checkpoint(net, y, use_reentrant=inner).tanh(), x, use_reentrant=outer
    )


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": partial(_checkpointed, use_reentrant=True),
    "not reentrant": partial(_checkpointed, use_reentrant=False),
    **{
        f"nested {outer} {inner}": partial(_nested, outer=outer, inner=inner)
        for outer in (False, True)
        for inner in (False, True)
    },
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("way", "suspending"),
    # Where the first forward runs with gradient, nothing is suspended.
    [*((way, False) for way in WAYS), ("reentrant", True), ("nested True True", True)],
)
def test_two_views_two_steps(way: str, suspending: bool, momentum: float | None) -> None:
    """Catches statistics that a repetition moves again, or that nothing moves (fairscale)."""
    want, got = _net(momentum=momentum), _net(momentum=momentum)
    if suspending:
        Suspending(got)
    for step in range(2):
        views = _images(step), _images(10 + step)
        for net, run in ((want, _plain), (got, WAYS[way])):
            outputs = [run(net, x) for x in views]
            if net is want and way.startswith("nested"):
                outputs = [y.tanh() for y in outputs]
            sum(y.pow(3).sum() for y in outputs).backward()  # type: ignore[union-attr]
            assert _counts(net) == [2 * step + 2] * 2
    if suspending:  # moved in the backward pass, in another order
        return
    _assert_same(got, want)


@MODES
def test_tracking_suspended_in_the_first_forward(mode: str) -> None:
    """Catches statistics that never move where code counts on the repetition."""
    layer, plain = ShuffleBatchNorm(3, mode=mode), nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    with torch.no_grad():
        layer.track_running_stats = False
        layer(x)
        layer.track_running_stats = True
    assert layer.num_batches_tracked == 0
    _in_backward(lambda: layer(x))
    plain(x)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def _in_backward(*calls: Callable[[], Any]) -> None:
    """Call functions one after the other in a backward pass, with gradient as checkpoints do."""
    y = torch.ones(1, requires_grad=True) * 2

    def hook(_: Tensor, call: Callable[[], Any]) -> None:
        with torch.enable_grad():
            call()

    for call in calls:
        y.register_hook(partial(hook, call=call))
    y.backward()


@pytest.mark.parametrize("before", ["nothing", "with gradient", "another shape"])
def test_a_forward_in_a_backward_pass_that_repeats_none(before: str) -> None:
    """Catches a forward that is taken for a repetition because of where it runs."""
    layer, x = ShuffleBatchNorm(3, mode="local"), torch.randn(6, 3)
    number = 0
    if before == "with gradient":
        layer(x)
        number += 1
    if before == "another shape":
        with torch.no_grad():
            layer(torch.randn(4, 3))
        number += 1
    _in_backward(lambda: layer(x), lambda: layer(x))
    assert layer.num_batches_tracked == number + 2
    assert layer.running_mean is not None
    assert layer.running_mean.abs().min() > 0


def test_a_repetition_is_found_once() -> None:
    """Catches a forward without gradient after which nothing in a backward pass ever moves."""
    layer, x = ShuffleBatchNorm(3, mode="local"), torch.randn(6, 3)
    with torch.no_grad():
        layer(x)
    _in_backward(lambda: layer(x))
    assert layer.num_batches_tracked == 1, "a repetition"
    _in_backward(lambda: layer(x))
    assert layer.num_batches_tracked == 2, "none"


@REENTRANT
def test_a_pass_without_tracking_before_the_checkpoint(use_reentrant: bool) -> None:
    """Catches a teacher's pass, never repeated, that is taken for the first of a repetition."""
    net = _net("local")
    layer: Any = net.get_submodule("1")
    for step in range(3):
        layer.track_running_stats = False
        with torch.no_grad():
            net[:3](_images())
        layer.track_running_stats = True
        _checkpointed(net[:3], _images(), use_reentrant).sum().backward()
        assert _counts(net)[0] == step + 1


@REENTRANT
def test_mean_and_count_move_together(use_reentrant: bool) -> None:
    """Catches a checkpoint that stops between the two, since nothing after the layer is needed."""
    layer, plain = (
        ShuffleBatchNorm(3, mode="local", momentum=None),
        nn.BatchNorm1d(3, momentum=None),
    )
    Suspending(layer)
    for step in range(3):
        x = torch.randn(6, 3, requires_grad=True)
        with torch.no_grad():
            layer.track_running_stats = False
            layer(x)
            layer.track_running_stats = True
        checkpoint(layer, x, use_reentrant=use_reentrant).pow(2).sum().backward()
        plain(x)
        assert layer.num_batches_tracked == step + 1
        torch.testing.assert_close(layer.running_mean, plain.running_mean)


def test_many_shapes() -> None:
    """Catches notes that are lost, or kept for ever."""
    layer = ShuffleBatchNorm(3, mode="local")
    for length in range(2, 302):
        views = [torch.randn(length + view, 3, requires_grad=True) for view in range(2)]
        ys = [checkpoint(layer, x, use_reentrant=True) for x in views]
        torch.autograd.backward([y.sum() for y in ys])
        with torch.no_grad():
            layer(views[0])  # repeated by nobody
    assert layer.num_batches_tracked == 900
    assert len(layer._forwards._notes) <= 256


def test_forward_hooks_that_call_the_layer_again() -> None:
    """Catches counting by layer, not by forward: each of the user's forwards moves statistics."""
    layer, plain = ShuffleBatchNorm(3, mode="local"), nn.BatchNorm1d(3)
    for norm in (layer, plain):
        again = [True]

        def hook(module: nn.Module, inputs: Any, _output: Any, again: list[bool] = again) -> None:
            if again:
                again.clear()
                module(inputs[0] + 1)

        norm.register_forward_hook(hook)
        torch.manual_seed(3)
        norm(torch.randn(6, 3))
    assert layer.num_batches_tracked == plain.num_batches_tracked == 2
    torch.testing.assert_close(layer.running_mean, plain.running_mean)


def test_a_gradient_of_a_gradient_moves_nothing_more() -> None:
    """Catches a backward pass with create_graph that counts as a forward."""
    layer = ShuffleBatchNorm(3, mode="local")
    x = torch.randn(6, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    assert layer.num_batches_tracked == 1
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()
    assert layer.num_batches_tracked == 1


@REENTRANT
def test_one_record_per_forward(use_reentrant: bool) -> None:
    """Catches a repetition that is recorded, also where it is the one that moves statistics."""
    net = _net()
    Suspending(net)
    with record_statistics(net) as records:
        _checkpointed(net, _images(), use_reentrant).sum().backward()
    assert [record.name for record in records] == ["1", "3"]


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_the_function_follows_the_same_rule(way: str) -> None:
    """Catches a rule that only layers know."""
    x = torch.randn(6, 3, requires_grad=True)
    buffers = torch.zeros(3), torch.ones(3)

    def run(y: Tensor) -> Tensor:
        return shuffle_batch_norm(y.sin(), *buffers, training=True, mode="local", groups=2)

    checkpoint(run, x, use_reentrant=way == "reentrant").sum().backward()
    once = [b.clone() for b in buffers]
    torch._foreach_zero_(list(buffers))
    buffers[1].fill_(1)
    run(x)
    for got, want in zip(once, buffers, strict=True):
        torch.testing.assert_close(got, want)
    _in_backward(lambda: run(x))
    assert not torch.equal(once[0], buffers[0]), "no repetition"


@REENTRANT
def test_the_function_knows_buffers_that_are_views(use_reentrant: bool) -> None:
    """Catches statistics that move twice because each call has another view of them."""
    rows = torch.stack([torch.zeros(3), torch.ones(3)])
    x = torch.randn(6, 3, requires_grad=True)

    def run(y: Tensor) -> Tensor:
        return shuffle_batch_norm(y.sin(), rows[0], rows[1], training=True, mode="local")

    y: Any = checkpoint(run, x, use_reentrant=use_reentrant)
    once = rows.clone()
    y.sum().backward()
    assert torch.equal(rows, once)


def _on_ranks(way: str, mode: str) -> list[int]:
    want, got = _net(mode), _net(mode)
    rank = torch.distributed.get_rank()
    for net, run in ((want, _plain), (got, WAYS[way])):
        outputs = [run(net, _images(5 * rank + view)) for view in range(2)]
        if net is want and way.startswith("nested"):
            outputs = [y.tanh() for y in outputs]
        sum(y.pow(3).sum() for y in outputs).backward()  # type: ignore[union-attr]
    _assert_same(got, want)
    return _counts(got)


@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "nested True False"])
def test_on_ranks(way: str, mode: str) -> None:
    """Catches a rule that holds in one process alone."""
    assert run_on_ranks(3, _on_ranks, way, mode) == [[2, 2]] * 3


def test_a_copy_does_not_wait_for_the_originals_repetition() -> None:
    """Catches a deep copy, as of MoCo's key encoder, that shares what it has to repeat."""
    net = _net("local")
    y = checkpoint(net, _images(), use_reentrant=True)
    twin = copy.deepcopy(net)
    y.sum().backward()
    _in_backward(lambda: twin(_images()))
    assert (_counts(net), _counts(twin)) == ([1, 1], [2, 2])
