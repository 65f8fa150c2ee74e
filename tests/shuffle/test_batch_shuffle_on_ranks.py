"""batch_shuffle between real processes: round trips, gradients, traffic, memory, the compiler."""

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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import truth
from ranks import run_on_ranks
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    ShuffledPairSampler,
    batch_shuffle,
    batch_unshuffle,
    get_shuffle_state,
    set_shuffle_state,
)
from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.shuffle import transport
from shuffle_batchnorm.shuffle.permutations import Key, Route, samples_sent_to
from shuffle_batchnorm.shuffle.plan import ShufflePlan


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
    shuffled, plan = batch_shuffle(tree)
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


def _network() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    return nn.Sequential(*layers).double()


def _inputs(sizes: list[int]) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(n, 2, 5, 5, dtype=torch.float64) + rank for rank, n in enumerate(sizes)]


def _weights(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).view(y.shape[1:])


def _encode(sizes: list[int]) -> Any:
    x = _inputs(sizes)[dist.get_rank()].requires_grad_()
    set_shuffle_state((7, 3))
    encoder = ShuffledEncoder(_network())
    y = encoder(x)
    (y.square() * _weights(y)).sum().backward()
    return y.detach(), x.grad, [p.grad for p in encoder.parameters()]


@pytest.mark.parametrize("sizes", [[4, 4], [3, 5], [6, 6, 6], [4, 3, 5]], ids=str)
def test_shuffled_encoder_equals_one_process(sizes: list[int]) -> None:
    """Catches a gradient that doesn't travel back (moco#67), and groups that aren't mixed."""
    results = run_on_ranks(len(sizes), _encode, sizes)
    xs = [x.requires_grad_() for x in _inputs(sizes)]
    everything, network = torch.cat(xs), _network()
    orders = [samples_sent_to(rank, Key(7, 3), sizes) for rank in range(len(sizes))]
    shuffled = torch.cat([network(everything[order]) for order in orders])
    y = shuffled[torch.argsort(torch.cat(orders))]
    (y.square() * _weights(y)).sum().backward()
    close: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y.detach(), **close)
    for x, result in zip(xs, results, strict=True):
        torch.testing.assert_close(result[1], x.grad, **close)
    for k, parameter in enumerate(network.parameters()):
        total = torch.stack([result[2][k] for result in results]).sum(dim=0)
        torch.testing.assert_close(total, truth.gradient(parameter), **close)


def _regroup_against_shuffle(n: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    converted = ShuffleBatchNorm.convert_shuffle_batchnorm(_network(), mode="regroup")
    x = _inputs([n] * size)[rank]
    chunks = list(torch.arange(n).split(n // size))  # block c goes to rank r + c
    others = [to for to in range(size) if to != rank]
    order = torch.cat([chunks[(to - rank) % size] for to in (*others, rank)])
    splits = tuple(n // size if to != rank else 0 for to in range(size))
    world = batch_shuffle(x)[1].world
    route = Route(order, splits, torch.arange(n), splits)
    plan = ShufflePlan(world, (n,) * size, Key(0, 0), route)
    results = []
    for leaf, by in (
        (x.clone().requires_grad_(), None),
        (x.clone().requires_grad_(), plan),
    ):
        y: Tensor = converted(leaf) if by is None else _by_plan(_network(), leaf, by)
        (y.square() * _weights(y)).sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def _by_plan(network: nn.Module, x: Tensor, plan: ShufflePlan) -> Any:
    return batch_unshuffle(network(batch_shuffle(x, plan=plan)[0]), plan)


@pytest.mark.parametrize("world_size", [2, 3])
def test_moving_samples_equals_regroup(world_size: int) -> None:
    """Catches a difference between the library's two ways of doing what MoCo does."""
    run_on_ranks(world_size, _regroup_against_shuffle, 6)


def _under_ddp() -> list[Tensor]:
    x = _inputs([4, 4])[dist.get_rank()]
    encoder = ShuffledEncoder(_network())
    model = DistributedDataParallel(encoder)
    set_shuffle_state((7, 3))
    for _ in range(2):
        y = model(x)
        (y.square() * _weights(y)).sum().backward()
    return [truth.gradient(p) for p in encoder.parameters()]


def test_under_ddp_gradients_are_averages() -> None:
    """Catches messages of the shuffle and of DDP that get in each other's way."""
    first, second = run_on_ranks(2, _under_ddp)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    xs, network = torch.cat(_inputs([4, 4])), _network()
    for step in (3, 4):
        for order in (samples_sent_to(rank, Key(7, step), [4, 4]) for rank in range(2)):
            y = network(xs[order])
            (y.square() * _weights(y)).sum().div(2).backward()
    wanted = [truth.gradient(p) for p in network.parameters()]
    torch.testing.assert_close(first, wanted, rtol=1e-10, atol=1e-10)


def _peak(run: Any) -> int:
    """Return the most bytes that are allocated at once, of five times."""
    peak = 0
    for _ in range(5):
        transport._buffers.clear()  # what is kept for the next call counts
        with PeakMemory() as memory:
            run()
        peak = max(peak, memory.peak)
    return peak


def _costs() -> tuple[list[Message], list[Message], list[Message], float, int]:
    x = torch.randn(32, 3, 32, 32, requires_grad=True)
    two = {"x": x, "y": torch.arange(32)}
    group = dist.new_group()  # that has no habits yet
    with received_messages() as first:
        batch_shuffle(two, process_group=group)
    for _ in range(6):
        batch_shuffle(two, process_group=group)
    with received_messages() as forward:
        shuffled = batch_shuffle(two, process_group=group)[0]["x"]
    with received_messages() as backward:
        shuffled.sum().backward()
    last = x.detach().to(memory_format=torch.channels_last)
    peaks = [_peak(lambda: batch_shuffle(x.detach())), _peak(lambda: batch_shuffle(last))]
    total = batch_shuffle(x)[0].sum()  # whose gradient is expanded, not a tensor of its own
    peaks.append(_peak(lambda: torch.autograd.grad(total, x, retain_graph=True)))
    peak = max(peaks)
    return first, forward, backward, peak / x.nbytes, x.nbytes + two["y"].nbytes


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_sample_travels_once_and_little_is_allocated(world_size: int) -> None:
    """Catches an all_gather: bytes beyond N (W - 1) / W samples, memory of W batches."""
    for first, forward, backward, peak, size in run_on_ranks(world_size, _costs):
        share = (world_size - 1) / world_size
        assert [name for name, _ in first] == ["all_to_all_single"] * 2  # header and samples
        assert first[1][1] == size * share
        # Out of habit the header is left out, and 8 bytes go with every sample, up to a whole
        # cache line: 12,288 + 8 + 8 bytes are 193 lines less 48 bytes.
        assert forward == [("all_to_all_single", (size + 32 * (8 + 48)) * share)]
        assert sum(received for _, received in first) <= 1.05 * size * share
        assert forward[0][1] <= 1.05 * size * share
        assert [name for name, _ in backward] == ["all_to_all_single"]
        assert peak <= 2.2


def _messages_per_call(program: str, rounds: int) -> list[int]:
    """Run a program of (s)huffles and (u)nshuffles; return the messages of each of its calls."""
    group = dist.new_group()  # that has no habits yet
    counts = []
    plans: list[ShufflePlan] = []
    for _ in range(rounds):
        for letter in program:
            with received_messages() as messages:
                if letter == "u":
                    batch_unshuffle(torch.randn(4, 3), plans.pop())
                else:
                    x = torch.randn({"s": 4, "t": 8, "x": 3}[letter], 2)
                    plans.append(batch_shuffle(x, process_group=group)[1])
            counts.append(len(messages))
        plans.clear()
    return counts


@pytest.mark.parametrize(
    ("program", "period"),
    [("su", [1, 1]), ("ssuu", [1, 1, 1, 1]), ("tssuu", [1] * 5), ("x", [2]), ("xsu", [2, 1, 1])],
)
def test_what_a_loop_repeats_takes_one_message(program: str, period: list[int]) -> None:
    """Catches guesses that are never made, made for a call that needs its sizes, or often wrong."""
    for counts in run_on_ranks(2, _messages_per_call, program, 12):
        assert counts[-len(period) :] == period
        assert 3 not in counts  # a wrong guess: a message for nothing, the header, the samples


def _two_plans(program: str) -> None:
    rank = dist.get_rank()
    even, uneven = (batch_shuffle(torch.randn(n, 2))[1] for n in (4, 4 + 2 * rank))
    for letter in program:
        plan = even if letter == "e" else uneven
        x = torch.randn(plan.sizes[rank], 2)
        shuffled = batch_shuffle(x, plan=plan)[0]
        assert torch.equal(batch_unshuffle(shuffled, plan), x)


def test_a_habit_of_even_batches_does_not_take_an_uneven_plan_for_one() -> None:
    """Catches a rank whose batch has the usual size while its peer's has not: gloo aborts."""
    run_on_ranks(2, _two_plans, "eeeeeueeuu")


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


def _checkpointed() -> str:
    x = _inputs([4, 4])[dist.get_rank()].requires_grad_()
    encoder = ShuffledEncoder(_network())
    y: Tensor = checkpoint(encoder, x, use_reentrant=False)
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    batch_shuffle(x)  # the ranks are in step
    return str(caught.value)


def test_a_shuffle_inside_a_checkpoint_is_refused() -> None:
    """Catches a recomputation with another permutation, whose gradients are of other samples."""
    for text in run_on_ranks(2, _checkpointed):
        assert text.startswith("batch_shuffle: an activation checkpoint, or a compiler")


def test_a_wrong_guess_is_made_ever_more_rarely() -> None:
    """Catches a loop that pays for the same wrong guess again and again."""
    for counts in run_on_ranks(2, _messages_per_call, "sssssssst", 40):  # after ssss: s or t
        assert 1 <= counts.count(3) <= 8


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


def _sampled(length: int, drop_last: bool) -> int:
    images = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
    sampler = ShuffledPairSampler(images, batch_size=4, seed=5, drop_last=drop_last)
    loader = DataLoader(sampler.dataset, batch_sampler=sampler)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for step, (queries, keys) in enumerate(loader):
            plan = sampler.plan(step)
            assert torch.equal(batch_shuffle(queries, plan=plan)[0], keys)
            assert torch.equal(batch_unshuffle(keys, plan), queries)
            seen.append(tuple(keys.flatten().tolist()))
    assert len(set(seen)) == len(seen) == 2 * len(sampler)
    return sum(map(len, seen)) // 3


@pytest.mark.parametrize(
    ("world_size", "length", "drop_last", "read"),
    [
        (2, 29, True, 24),
        (2, 29, False, 29),
        (3, 29, True, 24),
        (2, 63, False, 63),  # the last step has (4, 3) samples: one rank has as many as ever
        (3, 25, False, 24),  # one sample is left for three ranks
    ],
)
def test_the_sampler_loads_what_the_shuffle_would_send(
    world_size: int, length: int, drop_last: bool, read: int
) -> None:
    """Catches a key loaded on the wrong rank or at the wrong place, and a repeated epoch."""
    assert sum(run_on_ranks(world_size, _sampled, length, drop_last)) == 2 * read


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


def _sampler_before_the_group() -> list[str]:
    sampler = ShuffledPairSampler(range(16), batch_size=2)
    sampler._world = World()  # as it is before init_process_group
    texts = []
    for use in (lambda: next(iter(sampler)), lambda: sampler.plan(0)):
        with pytest.raises(RuntimeError, match="make it after init_process_group") as caught:
            use()
        texts.append(str(caught.value))
    return texts


def test_a_sampler_made_before_the_group_is_refused() -> None:
    """Catches ranks that load the same samples and shuffle nothing."""
    for rank, texts in enumerate(run_on_ranks(2, _sampler_before_the_group)):
        assert all(f"rank 0 of 1, but this is rank {rank} of 2" in text for text in texts)


def _different_samplers(options: list[dict[str, Any]]) -> str:
    mine = options[dist.get_rank()]
    sampler = ShuffledPairSampler(range(mine.pop("length", 16)), batch_size=4, **mine)
    with pytest.raises(ValueError, match="ranks disagree on order") as caught:
        batch_unshuffle(torch.randn(4, 2), sampler.plan(0))
    return str(caught.value)


@pytest.mark.parametrize(
    ("other", "said"), [({"length": 17}, "17 samples"), ({"shuffle": False}, "shuffle=False")]
)
def test_ranks_whose_samplers_differ_are_told(other: dict[str, Any], said: str) -> None:
    """Catches features brought to the queries of other images: the plans alone are the same."""
    for text in run_on_ranks(2, _different_samplers, [{}, other]):
        assert "16 samples, batch_size=4, seed=0, shuffle=True, drop_last=True" in text
        assert said in text


def _keys_by_epoch() -> list[list[int]]:
    sampler = ShuffledPairSampler(range(64), batch_size=32, shuffle=False)
    keys = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys.append([key for _, key in next(iter(sampler))])
    return keys


def test_each_epoch_has_other_keys() -> None:
    """Catches an epoch that the shuffles don't know of, where the order of the data is kept."""
    for first, second in run_on_ranks(2, _keys_by_epoch):
        assert first != second


def _leaving_with_the_first() -> list[tuple[int, ...]]:
    """Which of rank 1's samples are on the rank of rank 0's first one, by step."""
    set_shuffle_state((5, 0))
    company: list[tuple[int, ...]] = []
    for _ in range(40):
        x = torch.arange(4) + 4 * dist.get_rank()
        shuffled = batch_shuffle(x)[0].tolist()
        company.append(tuple(sample for sample in shuffled if sample >= 4) if 0 in shuffled else ())
    return company


def test_ranks_choose_for_themselves() -> None:
    """Catches one choice for all ranks, by which samples of the same place always meet."""
    here, there = run_on_ranks(2, _leaving_with_the_first)
    company = {mine or theirs for mine, theirs in zip(here, there, strict=True)}
    # Any two of rank 1's four samples: 6 pairs, each in any order.
    assert len({frozenset(pair) for pair in company}) == 6


def _evaluates() -> int:
    encoder = ShuffledEncoder(nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 3)
    with received_messages() as messages:
        assert torch.equal(encoder(x), encoder.encoder(x))
    return len(messages)


def test_evaluation_sends_nothing() -> None:
    """Catches a shuffle in eval mode, where ranks may have batches of any number."""
    assert run_on_ranks(2, _evaluates) == [0, 0]
