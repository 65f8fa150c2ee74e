"""torch.compile takes every mode in one graph, ranks included, with the same results."""

import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm
from truth import gradient


def _steps(model: nn.Module, x: Tensor, backend: str | None) -> list[Tensor]:
    """Outputs, gradients and buffers of two steps, compiled by a backend or not."""
    run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for _ in range(2):
        x.grad = None
        y = run(x)
        y.pow(3).sum().backward()
        results += [y.detach(), gradient(x)]
    grads = [gradient(p) for p in model.parameters()]
    return [t.detach().clone() for t in (*results, *grads, *model.buffers())]


def _compiled_against_eager(
    mode: str, groups: int, backend: str, blocks: int = 8, plain: bool = False
) -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # dynamo's, of its own autograd.Function
    torch._dynamo.reset()
    results = []
    for how in (None, backend):
        torch.manual_seed(1)
        norm = ShuffleBatchNorm(
            4, mode=mode, groups=groups, blocks=blocks, momentum=None,
            affine=not plain, track_running_stats=not plain,
        )  # fmt: skip
        # In float64, since the gradient of the convolution's bias is nothing but rounding errors.
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()).double()
        rank = dist.get_rank() if dist.is_initialized() else 0
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64).requires_grad_()
        results.append(_steps(model, x, how))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mode", "groups", "plain"),
    # Each mode, what one group does in another way, and layers without parameters and buffers.
    [
        *((mode, 4, False) for mode in ("local", "sync", "swap", "regroup")),
        ("local", 1, False),
        ("local", 1, True),
        ("regroup", 4, True),
    ],
)
def test_one_process_compiles_to_one_graph(mode: str, groups: int, plain: bool) -> None:
    """Catches a graph break: fullgraph=True refuses one."""
    with warnings.catch_warnings():
        _compiled_against_eager(mode, groups, "aot_eager", plain=plain)


@pytest.mark.parametrize(
    ("mode", "blocks"),
    # 8 blocks are as many as there are groups; 2 are fewer.
    [("local", 8), ("sync", 8), ("swap", 8), ("regroup", 8), ("regroup", 2)],
)
def test_ranks_compile_to_one_graph(mode: str, blocks: int) -> None:
    """Catches collectives that the compiler can't trace, or that give no gradient (#152131)."""
    for plain in (False, True):
        run_on_ranks(2, _compiled_against_eager, mode, 2, "aot_eager", blocks, plain, timeout=120)


@pytest.mark.parametrize(
    ("mode", "marked"),
    [("sync", True), ("swap", True), ("regroup", True), ("regroup", False)],
)
def test_batches_of_many_sizes_share_few_graphs(mode: str, marked: bool) -> None:
    """Catches a recompilation for each batch size, by a loop over samples or over full blocks."""
    torch._dynamo.reset()
    layer, eager = (ShuffleBatchNorm(4, mode=mode, groups=8).double() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        run = torch.compile(layer, fullgraph=True, backend=counter)
        # With 2 samples per group, most of its blocks are empty.
        for n in (16, 24, 40, 56, 72, 96, 128, 136):
            x = torch.randn(n, 4, 3, dtype=torch.float64)
            xs = [x.clone().requires_grad_() for _ in range(2)]
            if marked:
                torch._dynamo.mark_dynamic(xs[0], 0)
            ys = run(xs[0]), eager(xs[1])
            for y in ys:
                y.pow(3).sum().backward()
            torch.testing.assert_close(*ys)
            torch.testing.assert_close(*map(gradient, xs))
            for pair in zip(layer.buffers(), eager.buffers(), strict=True):
                torch.testing.assert_close(*pair)
    assert counter.frame_count <= (2 if marked else 3)
