"""The backward pass of the layer: its gradients, its memory, and who calls it when."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, shuffle_batch_norm, shuffle_offset
from shuffle_batchnorm.norm.mixing import MODES
from truth import gradient

MODE = pytest.mark.parametrize("mode", MODES)
LAST = torch.channels_last


@pytest.mark.parametrize(
    ("mode", "groups", "blocks"),
    # Across ranks finite differences check it again; here blocks matter to `regroup` alone.
    [*((mode, 2, 8) for mode in MODES), ("local", 1, 8), ("regroup", 4, 8), ("regroup", 4, 3)],
)
def test_gradcheck(mode: str, groups: int, blocks: int) -> None:
    """Catches a gradient that is not that of the forward: the seed's is wrong by 40 to 130 %."""
    x = torch.randn(groups * 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        kwargs: dict[str, Any] = dict(mode=mode, groups=groups, offset=3, blocks=blocks)
        return shuffle_batch_norm(x, None, None, weight, bias, training=True, **kwargs)

    # The fast mode checks a random projection of the Jacobian.
    def check(function: Callable[..., Tensor], *inputs: Tensor, fast: bool = True) -> bool:
        return torch.autograd.gradcheck(function, inputs, fast_mode=fast)

    assert check(layer, x, weight, bias, fast=groups > 2)
    assert check(lambda t: layer(t, None, None), x)
    assert check(lambda t, w: layer(t, w, None), x, weight)
    assert check(lambda t, b: layer(t, None, b), x, bias)
    # Of a sum: a gradient with strides of 0; and of parameters alone, as in a first layer.
    assert check(lambda t: layer(t, weight, bias).square().sum(), x)
    assert check(lambda w, b: layer(x.detach(), w, b), weight, bias)


@MODE
def test_frozen_parameters_and_inputs_get_no_gradient(mode: str) -> None:
    """Catches gradients computed for what needs none, and those of the others lost by it."""
    for needs in itertools.product((True, False), repeat=3):
        layer = ShuffleBatchNorm(3, mode=mode, groups=2)
        x = torch.randn(8, 3, 4)
        for tensor, need in zip((x, layer.weight, layer.bias), needs, strict=True):
            tensor.requires_grad_(need)
        y = layer(x)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.square().sum().backward()
        for tensor, need in zip((x, layer.weight, layer.bias), needs, strict=True):
            assert (tensor.grad is not None) == need
            assert tensor.grad is None or tensor.grad.abs().sum() > 0


@MODE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_input_is_kept_for_backward(mode: str, layout: str, dtype: torch.dtype) -> None:
    """Catches a normalised copy, or a contiguous one, kept beside the input of every layer."""
    layer = ShuffleBatchNorm(6, mode=mode, groups=2)
    x = {
        "contiguous": torch.randn(8, 6, 16, 16),
        "channels_last": torch.randn(8, 6, 16, 16).contiguous(memory_format=LAST),
        "permuted": torch.randn(16, 8, 16, 6).permute(1, 3, 2, 0),
        "expanded": torch.randn(8, 6, 1, 1).expand(8, 6, 16, 16),
    }[layout]
    x = x.to(dtype).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() * t.element_size() > 4 * 16 * (2 * 6 + 1)]
    assert [(t.data_ptr(), t.stride()) for t in large] == [(x.data_ptr(), x.stride())]
    # Rows must not keep a large storage alive either.
    assert all(t.untyped_storage().nbytes() < 4096 for t in kept if t is not large[0])


@MODE
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("lines_of_gradient", [False, True])
@pytest.mark.parametrize("shape", [(8, 6, 3, 4), (8, 6, 2, 3, 4), (8, 6, 1, 1)])
def test_memory_format_in_and_out(
    mode: str, lines: bool, lines_of_gradient: bool, shape: tuple[int, ...]
) -> None:
    """Catches another format out than in, and a gradient misread in the other (pytorch#64039)."""
    channels_last = LAST if len(shape) == 4 else torch.channels_last_3d
    x, dy = torch.randn(shape), torch.randn(shape)
    layer = ShuffleBatchNorm(6, mode=mode, groups=2)
    want = layer(x.requires_grad_())
    want.backward(dy)
    z = x.detach().contiguous(memory_format=channels_last) if lines else x.detach().clone()
    z.requires_grad_()
    y = layer(z)
    y.backward(dy.contiguous(memory_format=channels_last) if lines_of_gradient else dy)
    assert x.grad is not None
    assert z.grad is not None
    assert y.stride() == z.stride() == z.grad.stride()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(z.grad, x.grad, rtol=1e-4, atol=1e-5)


def test_some_channels_of_channels_last() -> None:
    """Catches a chunk of a channels-last tensor that comes out in the other format."""
    x = torch.randn(8, 12, 3, 4).contiguous(memory_format=LAST)[:, 3:9]
    y = ShuffleBatchNorm(6, groups=2)(x)
    assert y.is_contiguous(memory_format=LAST)
    assert nn.BatchNorm2d(6)(x).stride() == y.stride()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.permute(2, 1, 0),
        lambda x: x[::2],
        lambda x: x[:, :, 1:3],
        lambda x: x[:, :, :1].expand(-1, -1, 4),
        lambda x: x.flip(0).transpose(0, 2),
    ],
    ids=["permuted", "every second sample", "cropped", "expanded", "transposed"],
)
def test_non_contiguous_inputs(make: Any) -> None:
    """Catches strides that are ignored, forward or backward (pytorch#62967)."""
    base = torch.randn(8, 6, 8, requires_grad=True)
    layer, grads, outputs = ShuffleBatchNorm(6, mode="regroup", groups=2), [], []
    for x in (make(base), make(base).contiguous()):
        y = layer(x)
        outputs.append(y)
        grads.append(torch.autograd.grad(y.pow(3).sum(), base)[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@MODE
def test_double_backward_says_so(mode: str) -> None:
    """Catches a second derivative that is silently wrong; the first must still be right."""
    layer = ShuffleBatchNorm(3, mode=mode, groups=2, dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    loss = layer(x).pow(3).sum()
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    tensors = [x, *layer.parameters()]
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    torch.testing.assert_close(grads[0], want)
    for grad in grads:
        with pytest.raises(RuntimeError, match=r"^shuffle_batch_norm: double backward is not"):
            torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    layer.eval()
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0


def _encoder(mode: str, groups: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [
        [nn.Conv1d(3, 3, 1), ShuffleBatchNorm(3, mode=mode, groups=groups), nn.Tanh()] for _ in "ab"
    ]
    return nn.Sequential(*itertools.chain(*layers)).double()


def _checkpointed(
    mode: str, how: str, momentum: float | None = 0.1, views: int = 1
) -> list[Tensor]:
    """Outputs, gradients and buffers after 2 steps."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank)
    model, results = _encoder(mode), []
    for layer in model:
        if isinstance(layer, ShuffleBatchNorm):
            layer.momentum = momentum
    for _ in range(2):
        x = torch.randn(8, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
        model.zero_grad()
        outputs = [
            model(x) if how == "plain" else checkpoint(model, x, use_reentrant=how == "reentrant")
            for _ in range(views)
        ]
        torch.stack(outputs).pow(3).sum().backward()
        results += [*outputs, x.grad, *(p.grad for p in model.parameters())]
    return [t.detach().clone() for t in (*results, *model.buffers()) if t is not None]


@MODE
@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_activation_checkpointing(mode: str, how: str, momentum: float | None) -> None:
    """Catches buffers and counters that the recomputation moves again (fairscale#694)."""
    for views in (1, 2):
        want = _checkpointed(mode, "plain", momentum, views)
        got = _checkpointed(mode, how, momentum, views)
        assert want[-1] == 2 * views, "num_batches_tracked"
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@MODE
@pytest.mark.parametrize("groups", [1, 2])
def test_selective_activation_checkpointing(mode: str, groups: int) -> None:
    """Catches a recomputation with an operation that the forward did not have."""
    results = []
    for selects in (False, True):
        model = _encoder(mode, groups)
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).sin().view(8, 3, 4).requires_grad_()
        if selects:
            save = [torch.ops.aten.convolution.default]
            contexts = partial(create_selective_checkpoint_contexts, save)
            y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        else:
            y = model(x)
        y.pow(3).sum().backward()
        results.append([y.detach(), gradient(x), *model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@MODE
@pytest.mark.parametrize("groups", [1, 2])
def test_running_statistics_may_move_before_the_backward_pass(mode: str, groups: int) -> None:
    """Catches a graph that holds buffers: other layouts, options, or a reset would break it."""
    layer = ShuffleBatchNorm(3, mode=mode, groups=groups)
    x = torch.randn(8, 3, 4, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    y = layer(x)
    layer(torch.randn(8, 4, 3).transpose(1, 2))
    vars(layer)["groups"] = 4
    layer(x.detach())
    layer.reset_running_stats()
    torch.testing.assert_close(torch.autograd.grad(y.pow(3).sum(), x)[0], want)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_activation_checkpointing_on_ranks(mode: str, how: str) -> None:
    """Catches ranks that recompute in another order than their peers exchange."""
    want = run_on_ranks(2, _checkpointed, mode, "plain", views=2)
    got = run_on_ranks(2, _checkpointed, mode, how, views=2)
    for g, w in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_another_offset(reentrant: bool) -> None:
    """Catches a recomputation with another offset than the forward had."""
    model = _encoder("swap")
    for layer in (model[1], model[4]):
        vars(layer)["groups"] = 4

    def run(t: Tensor) -> Tensor:
        # Inside what is checkpointed, so that the recomputation enters it too.
        with shuffle_offset(model, 3):
            return torch.tanh(model(t))

    x = torch.randn(8, 3, 4, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(run(x).pow(3).sum(), x)
    checkpoint(run, x, use_reentrant=reentrant).pow(3).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-12)
