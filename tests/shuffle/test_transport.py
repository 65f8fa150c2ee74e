"""Moving samples between real processes: round trips, gradients, traffic, memory, the compiler."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meters import Message, PeakMemory, received_messages
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import truth
from ranks import run_on_ranks
from shuffle.networks import inputs, network, weights
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    batch_shuffle,
    batch_unshuffle,
    get_shuffle_state,
    set_shuffle_state,
)
from shuffle_batchnorm.shuffle.permutations import Key, Route
from shuffle_batchnorm.shuffle.plan import ShufflePlan


def test_one_process_shuffles_and_restores_any_tree() -> None:
    """Catches a call that needs a process group, and leaves that are forgotten."""
    tree: dict[str, Any] = {
        "x": torch.randn(6, 3, 2, 2), "rest": [torch.arange(6), None, torch.rand(6) > 0.5]
    }  # fmt: skip
    shuffled, plan = batch_shuffle(tree)
    order = shuffled["rest"][0]
    assert sorted(order.tolist()) == list(range(6))
    assert torch.equal(shuffled["x"], tree["x"][order])
    restored = batch_unshuffle(shuffled, plan)
    assert restored["rest"][1] is None
    assert torch.equal(restored["x"], tree["x"])
    assert torch.equal(batch_shuffle(tree["x"], plan=plan)[0], shuffled["x"])


def test_first_and_second_gradients() -> None:
    """Catches a gradient that isn't moved back, or only once."""
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    _, plan = batch_shuffle(x)

    def through(x: Tensor) -> Tensor:
        y: Tensor = batch_unshuffle(batch_shuffle(x, plan=plan)[0] ** 3, plan)
        return y * torch.arange(5.0)[:, None]

    assert torch.autograd.gradcheck(through, x)
    assert torch.autograd.gradgradcheck(through, x)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_one_process_compiles_with_its_gradient(last: bool, dynamic: bool | None) -> None:
    """Catches a gradient of zeros, which torch 2.11 compiles to where a result is its input."""
    warnings.filterwarnings("ignore", message=".*should not be instantiated")
    torch._dynamo.reset()

    def step(x: Tensor) -> Any:
        shuffled, plan = batch_shuffle(x)
        return batch_unshuffle(shuffled.sin(), plan)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (6, 8):
        x = torch.randn(n, 2, 3, 4)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        x.requires_grad_()
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, x.sin())
        assert y.stride() == x.stride()
        torch.testing.assert_close(truth.gradient(x), x.detach().cos())


def _tree(n: int, rank: int) -> dict[str, Any]:
    image = torch.randn(n, 3, 4, 5) + rank
    return {
        "channels_last": image.to(memory_format=torch.channels_last),
        "strided": torch.randn(7, 2 * n).t()[::2],
        "rest": [torch.arange(n) + 100 * rank, torch.rand(n, 2) > 0.5, None],
        "half": (torch.randn(n, 3).bfloat16(), torch.randn(n, 0), torch.randn(n).to(torch.cfloat)),
        "short": torch.arange(n, dtype=torch.int16),
    }


def _round_trip(sizes: list[int]) -> list[int]:
    rank = dist.get_rank()
    tree = _tree(sizes[rank], rank)
    shuffled, plan = batch_shuffle(tree, process_group=dist.new_group())
    restored = batch_unshuffle(shuffled, plan)
    torch.testing.assert_close(restored, tree, rtol=0, atol=0)
    again = batch_shuffle({"other": tree["rest"][0].double()}, plan=plan)[0]["other"]
    assert torch.equal(again, shuffled["rest"][0].double())
    last = shuffled["channels_last"]
    assert not sizes[rank] or last.is_contiguous(memory_format=torch.channels_last)
    ids: list[int] = shuffled["rest"][0].tolist()
    # All leaves went the same way, bit for bit.
    assert shuffled["short"].tolist() == [k % 100 for k in ids]
    return ids


@pytest.mark.parametrize(
    "sizes",
    [[5], [8, 8], [5, 3], [0, 3], [0, 0], [6, 6, 6], [1, 1, 1], [0, 7, 2], [4] * 4, [3, 5, 2, 0],
     [8] * 8],
    ids=str,
)  # fmt: skip
def test_round_trip_is_exact_and_keeps_every_sample(sizes: list[int]) -> None:
    """Catches samples lost, doubled or mixed up between leaves, at awkward batch sizes."""
    results = run_on_ranks(len(sizes), _round_trip, sizes)
    assert [len(ids) for ids in results] == sizes
    everything = [100 * rank + k for rank, n in enumerate(sizes) for k in range(n)]
    assert sorted(k for ids in results for k in ids) == everything


def _regroup_against_shuffle(n: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    converted = ShuffleBatchNorm.convert_shuffle_batchnorm(network(), mode="regroup")
    x = inputs([n] * size)[rank]
    chunks = list(torch.arange(n).split(n // size))  # block c goes to rank r + c
    order = torch.cat([chunks[(to - rank) % size] for to in range(size)])
    splits = (n // size,) * size
    world = batch_shuffle(x)[1].world
    route = Route(order, splits, torch.arange(n), splits)
    plan = ShufflePlan(world, (n,) * size, Key(0, 0), route)
    results = []
    for leaf, by in (
        (x.clone().requires_grad_(), None),
        (x.clone().requires_grad_(), plan),
    ):
        y: Tensor = converted(leaf) if by is None else _by_plan(network(), leaf, by)
        (y.square() * weights(y)).sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def _by_plan(encoder: nn.Module, x: Tensor, plan: ShufflePlan) -> Any:
    return batch_unshuffle(encoder(batch_shuffle(x, plan=plan)[0]), plan)


@pytest.mark.parametrize("world_size", [2, 3])
def test_moving_samples_equals_regroup(world_size: int) -> None:
    """Catches a difference between the library's two ways of doing what MoCo does."""
    run_on_ranks(world_size, _regroup_against_shuffle, 6)


def _peak(run: Any) -> int:
    """Return the most bytes that are allocated at once, of five times."""
    peak = 0
    for _ in range(5):
        with PeakMemory() as memory:
            run()
        peak = max(peak, memory.peak)
    return peak


def _costs() -> tuple[list[Message], list[Message], float, int]:
    x = torch.randn(32, 3, 32, 32, requires_grad=True)
    two = {"x": x, "y": torch.arange(32)}
    batch_shuffle(two)
    with received_messages() as forward:
        shuffled = batch_shuffle(two)[0]["x"]
    with received_messages() as backward:
        shuffled.sum().backward()
    last = x.detach().to(memory_format=torch.channels_last)
    pair = [x.detach(), x.detach().double()]
    total = batch_shuffle(x)[0].sum()  # whose gradient is expanded, not a tensor of its own
    peaks = [_peak(lambda batch=batch: batch_shuffle(batch)) for batch in (x.detach(), last)]
    peaks.append(_peak(lambda: torch.autograd.grad(total, x, retain_graph=True)))
    peaks.append(_peak(lambda: batch_shuffle(pair)) // 3)
    return forward, backward, max(peaks) / x.nbytes, x.nbytes + two["y"].nbytes


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_sample_travels_once_and_little_is_allocated(world_size: int) -> None:
    """Catches an all_gather: bytes beyond N (W - 1) / W samples, memory of W batches."""
    for forward, backward, peak, size in run_on_ranks(world_size, _costs):
        assert forward == [("all_to_all_single", size * (world_size - 1) / world_size)]
        assert [name for name, _ in backward] == ["all_to_all_single"]
        assert peak <= 2.2


def _keep_results() -> None:
    results, expected = [], []
    for k in range(12):
        x = torch.randn(4, 3 if k < 6 else 300)
        with torch.inference_mode(k % 3 == 2):
            shuffled, plan = batch_shuffle(x)
            results += [shuffled, batch_unshuffle(shuffled.add_(1), plan)]
            features = batch_unshuffle(shuffled[:, :2].clone(), plan)
        expected += [result.clone() for result in results[-2:]]
        assert features.untyped_storage().nbytes() < 100
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def test_results_keep_their_values() -> None:
    """Catches a result in the memory that the next message is packed in, or in much too much."""
    run_on_ranks(2, _keep_results)


def _compiled() -> list[Tensor]:
    # Dynamo itself makes an instance of every autograd.Function that it traces.
    warnings.filterwarnings("ignore", message=".*should not be instantiated")
    set_shuffle_state(None)

    def step(x: Tensor, ids: Tensor) -> Any:
        (y, order), plan = batch_shuffle((x, ids))
        y = y.add_(0)  # as an encoder that begins with an in-place ReLU
        return batch_unshuffle({"y": y.square(), "ids": order}, plan), order

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, ids = torch.randn(6, 2, requires_grad=True), torch.arange(6) + 100 * dist.get_rank()
    orders = []
    for _ in range(2):
        outputs, order = compiled(x, ids)
        assert torch.equal(outputs["ids"], ids)
        assert torch.equal(outputs["y"], x.square())
        x.grad = None
        outputs["y"].sum().backward()
        assert torch.equal(truth.gradient(x), 2 * x.detach())
        orders.append(order)
    state = get_shuffle_state()
    assert state is not None
    assert state[1] == 2
    set_shuffle_state((state[0], 0))
    return [*orders, *(step(x, ids)[1] for _ in range(2))]


def test_the_stratified_case_compiles_in_one_graph() -> None:
    """Catches a permutation baked into the graph, ranks that trace other seeds, a graph break."""
    for one, two, eager_one, eager_two in run_on_ranks(2, _compiled, fresh=True, timeout=120):
        assert not torch.equal(one, two)
        assert torch.equal(one, eager_one)
        assert torch.equal(two, eager_two)


def _compiled_and_repeated() -> list[str]:
    warnings.filterwarnings("ignore", message=".*should not be instantiated")
    x = torch.randn(4, 2, requires_grad=True)
    plan = batch_shuffle(x)[1]

    def whole(x: Tensor) -> Tensor:
        shuffled, plan = batch_shuffle(x)
        y: Tensor = batch_unshuffle(shuffled.sin(), plan)
        return y

    def inside(x: Tensor) -> Tensor:
        shuffled, plan = batch_shuffle(x)
        features = checkpoint(torch.sin, shuffled, use_reentrant=False)
        y: Tensor = batch_unshuffle(features, plan)
        return y

    def with_a_plan(x: Tensor) -> Tensor:
        y: Tensor = batch_unshuffle(batch_shuffle(x, plan=plan)[0].sin(), plan)
        return y

    def checkpointed(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return partial(checkpoint, run, use_reentrant=False)

    compile: Any = partial(torch.compile, fullgraph=True, backend="aot_eager")
    for run in (compile(inside), compile(checkpointed(with_a_plan)), compile(whole)):
        x.grad = None
        run(x).sum().backward()
        torch.testing.assert_close(truth.gradient(x), x.detach().cos())
    # At its first import the partitioner's file is full of what torch itself calls deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    texts = []
    for run in (compile(checkpointed(whole)), checkpointed(compile(whole))):
        y = run(x)
        with pytest.raises(RuntimeError) as caught:
            y.sum().backward()
        texts.append(str(caught.value))
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        y = compile(whole, backend="aot_eager_decomp_partition")(x)
        with pytest.raises(RuntimeError) as caught:
            y.sum().backward()
    return [*texts, str(caught.value)]


def test_a_compiled_shuffle_that_is_repeated_is_refused() -> None:
    """Catches gradients of other samples; and a refusal of a checkpoint that does no harm."""
    for texts in run_on_ranks(2, _compiled_and_repeated, fresh=True, timeout=120):
        for text in texts:
            assert "batch_shuffle: an activation checkpoint, or a compiler" in text


def _compiled_in_a_group() -> None:
    warnings.filterwarnings("ignore", message=".*should not be instantiated")
    group = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2,))
    layer = ShuffleBatchNorm(2, mode="regroup", process_group=group)
    encoder = ShuffledEncoder(nn.BatchNorm1d(2), process_group=group)

    def shuffle(x: Tensor, group: Any) -> Tensor:
        shuffled, plan = batch_shuffle(x, process_group=group)
        y: Tensor = batch_unshuffle(shuffled.sin(), plan)
        return y

    x = torch.randn(4, 2)
    runs: list[Any] = [
        layer,
        encoder,
        *(partial(shuffle, group=given) for given in (group, dist.group.WORLD, mesh, None)),
    ]
    for run in runs:
        torch._dynamo.reset()
        results: list[Tensor] = []
        for same in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            set_shuffle_state((3, 1), group)
            results.append(same(x))
        torch.testing.assert_close(*results)


def test_every_handle_of_a_group_compiles() -> None:
    """Catches a question about a handle that the compiler can't answer."""
    run_on_ranks(2, _compiled_in_a_group, fresh=True, timeout=120)


def _no_grad() -> None:
    x = torch.randn(8, 3, requires_grad=True)
    for y in (batch_shuffle(x)[0], batch_shuffle([x, torch.arange(8)])[0][0]):
        y.mul_(2).sum().backward()
    assert truth.gradient(x).eq(4).all()
    with torch.no_grad():
        assert not batch_shuffle(x)[0].requires_grad
    assert batch_shuffle(x)[0].requires_grad
    assert not batch_shuffle(torch.arange(8))[0].requires_grad


def test_results_are_plain_tensors() -> None:
    """Catches a view, which can't be changed in place, and a graph where none is wanted."""
    run_on_ranks(2, _no_grad)
