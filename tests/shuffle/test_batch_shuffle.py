"""The shuffle's index arithmetic, and what can be seen of it in one process."""

import itertools
import re
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import truth
from shuffle_batchnorm import (
    ShuffledPairSampler,
    batch_shuffle,
    batch_unshuffle,
    get_shuffle_state,
    set_shuffle_state,
)
from shuffle_batchnorm.shuffle.permutations import (
    ALL_SAMPLES,
    ARRIVED,
    LEAVING,
    Key,
    Route,
    make_route,
    permutation,
    permutations,
    samples_sent_to,
    stratified_route,
)

SIZES = [[8, 8], [6, 6, 6], [3, 3], [1, 1, 1, 1], [5, 3], [0, 4, 2], [0, 0], [7], [16] * 8]


def _deliver(routes: list[Route], batches: list[Tensor]) -> list[Tensor]:
    """What every rank gets, by the definition of a route: no process, no network."""
    messages = []
    for rank, (x, route) in enumerate(zip(batches, routes, strict=True)):
        *sent, stays = x[route.send_order].split(
            [*route.send_splits, len(x) - sum(route.send_splits)]
        )
        assert not len(sent[rank])
        messages.append((sent, stays))
    return [
        torch.cat([*(sent[rank] for sent, _ in messages), messages[rank][1]])[route.place_order]
        for rank, route in enumerate(routes)
    ]


@pytest.mark.parametrize("sizes", SIZES)
def test_routes_of_all_ranks_fit_and_keep_every_sample(sizes: list[int]) -> None:
    """Catches a sample lost or doubled, splits that don't match, and an inverse that isn't one."""
    batches = list(torch.arange(sum(sizes)).split(sizes))
    for step in range(5):
        key = Key(3, step)
        routes = [make_route(key, sizes, rank) for rank in range(len(sizes))]
        for (a, one), (b, other) in itertools.product(enumerate(routes), repeat=2):
            assert one.send_splits[b] == other.receive_splits[a]
        arrived = _deliver(routes, batches)
        assert [len(x) for x in arrived] == sizes
        assert torch.cat(arrived).sort().values.tolist() == list(range(sum(sizes)))
        for rank, x in enumerate(arrived):
            assert torch.equal(x, samples_sent_to(rank, key, sizes))
        back = _deliver([route.inverse() for route in routes], arrived)
        assert all(map(torch.equal, back, batches))


def test_a_stratified_shuffle_deals_every_rank_the_same_share() -> None:
    """Catches a permutation that leaves more than 1 / W of a sample's company together."""
    sizes = [12] * 4
    for step in range(50):
        for rank in range(4):
            sources = samples_sent_to(rank, Key(0, step), sizes) // 12
            assert sources.bincount(minlength=4).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("sizes", "steps"), [([4, 4], 4000), ([3, 5], 4000)])
def test_a_sample_lands_on_every_place_equally_often(sizes: list[int], steps: int) -> None:
    """Catches a biased permutation, and one that leaves the places within a rank alone."""
    total = sum(sizes)
    counts = torch.zeros(total, total)
    for step in range(steps):
        arrived = [samples_sent_to(rank, Key(1, step), sizes) for rank in range(len(sizes))]
        counts[torch.arange(total), torch.cat(arrived)] += 1
    # chi squared with (total - 1)**2 = 49 degrees of freedom: above 90 once in 3,000 seeds
    expected = steps / total
    assert ((counts - expected).square() / expected).sum() < 90


def test_all_orders_of_four_samples_are_equally_frequent() -> None:
    """Catches an order that follows from its first element, or a hash with a pattern."""
    steps = 12_000
    counts = Counter(
        tuple(permutation(Key(5, step), ALL_SAMPLES, 0, 4).tolist()) for step in range(steps)
    )
    assert len(counts) == 24
    assert sum((n - steps / 24) ** 2 / (steps / 24) for n in counts.values()) < 55  # 23 degrees


def test_an_order_depends_on_every_number_and_on_nothing_else() -> None:
    """Catches a seed, step, kind or rank that is ignored, and the global random state."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (2**40, 0, 0, 0), (0, 1, 0, 0), (0, 2**40, 0, 0)]
    keys += [(0, 0, 1, 0), (0, 0, 0, 1)]
    before = torch.get_rng_state()
    orders = {tuple(permutation(Key(s, t), k, r, 64).tolist()) for s, t, k, r in keys}
    again = {tuple(permutation(Key(s, t), k, r, 64).tolist()) for s, t, k, r in keys}
    assert len(orders) == len(keys)
    assert orders == again
    assert torch.equal(before, torch.get_rng_state())


def test_orders_never_change() -> None:
    """Catches a new hash, which would make every seeded run another one."""
    assert permutation(Key(1, 2), ALL_SAMPLES, 3, 8).tolist() == [0, 3, 5, 6, 7, 1, 2, 4]


@pytest.mark.parametrize("n", [8, 128, 129])
def test_orders_made_ahead_are_those_made_alone(n: int) -> None:
    """Catches a block of steps that begins elsewhere, and kinds or seeds that share one."""
    for step, seed in itertools.product((0, 1, 15, 16, 17, 2**40 + 31), (3, 2**61)):
        key, in_graph = Key(seed, step), Key(torch.tensor(seed), torch.tensor(step))
        for kinds in ((LEAVING, ARRIVED), (ARRIVED,)):
            orders, others = (permutations(k, kinds, 1, n) for k in (key, in_graph))
            assert torch.equal(torch.stack(orders), torch.stack(others))
        for size in (1, 2, 8) if n % 8 == 0 else (1, 3):
            for rank in (0, size - 1):
                route, alone = (stratified_route(k, n, size, rank) for k in (key, in_graph))
                assert bool(route.inverses) == (step > 0 and n <= 128)
                assert not alone.inverses
                for _ in range(3):
                    assert torch.equal(route.send_order, alone.send_order)
                    assert torch.equal(route.place_order, alone.place_order)
                    assert route[1::2] == alone[1::2]
                    route, alone = route.inverse(), alone.inverse()


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


def test_state_and_generator_repeat_a_run() -> None:
    """Catches a counter that doesn't advance, a resume that starts anew, a touched global state."""
    x, before = torch.arange(32), torch.get_rng_state()
    set_shuffle_state(None)
    assert get_shuffle_state() is None
    first = batch_shuffle(x)[0]
    state = get_shuffle_state()
    assert state is not None
    assert state[1] == 1
    second, third = batch_shuffle(x)[0], batch_shuffle(x)[0]
    set_shuffle_state(state)
    assert torch.equal(batch_shuffle(x)[0], second)
    assert torch.equal(batch_shuffle(x)[0], third)
    assert get_shuffle_state() == (state[0], 3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    drawn = [batch_shuffle(x, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_orders_belong_to_their_plan() -> None:
    """Catches orders kept for later calls where callers, or the modes of one call, change them."""
    x = torch.arange(32)
    set_shuffle_state((12, 1))
    with torch.inference_mode():
        expected, plan = batch_shuffle(x)
        plan.route.send_order.fill_(0)
    set_shuffle_state((12, 1))
    with torch.device("meta"):
        assert torch.equal(batch_shuffle(x)[0], expected)
    set_shuffle_state((12, 1))
    assert torch.equal(batch_shuffle(x)[0], expected)


def test_first_and_second_gradients() -> None:
    """Catches a gradient that isn't moved back, or only once."""
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    _, plan = batch_shuffle(x)

    def through(x: Tensor) -> Tensor:
        y: Tensor = batch_unshuffle(batch_shuffle(x, plan=plan)[0] ** 3, plan)
        return y * torch.arange(5.0)[:, None]

    assert torch.autograd.gradcheck(through, x)
    assert torch.autograd.gradgradcheck(through, x)


def test_unshuffling_twice_is_refused_and_many_outputs_are_not() -> None:
    """Catches a second unshuffle, and a plan that can be used for a single output only."""
    shuffled, plan = batch_shuffle(torch.randn(8, 3))
    features = batch_unshuffle(shuffled * 2, plan)
    other = batch_unshuffle({"a": shuffled * 3, "b": shuffled}, plan)
    for twice in (features, other["b"], [shuffled * 2, other["a"]], features[:, :2]):
        with pytest.raises(ValueError, match=r"batch_unshuffle: leaf ., shape .* unshuffled with"):
            batch_unshuffle(twice, plan)
    batch_unshuffle(features, batch_shuffle(features)[1])


Refused = tuple[Any, type[Exception], str]
REFUSED: dict[str, Refused] = {
    "scalar": (torch.tensor(1.0), ValueError, r"leaf 0 is a scalar \(torch.float32\)"),
    "no tensor": ([None], ValueError, "the batch has no tensor"),
    "text": ({"x": torch.ones(2), "y": ["a"]}, TypeError, "got str in leaf 1"),
    "sizes": ([torch.ones(2), torch.ones(3, 1)], ValueError, r"2 in shape \(2,\), 3 in shape"),
    "sparse": (torch.eye(2).to_sparse(), TypeError, "got torch.sparse_coo in leaf 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages_name_call_value_and_rule(name: str) -> None:
    """Catches bad input that is let through, or refused without a reason."""
    batch, error, message = REFUSED[name]
    with pytest.raises(error, match=f"batch_shuffle: .*{message}"):
        batch_shuffle(batch)
    with pytest.raises(error, match=f"batch_unshuffle: .*{message}"):
        batch_unshuffle(batch, batch_shuffle(torch.ones(2))[1])


def test_plans_that_do_not_fit_are_refused() -> None:
    """Catches MoCo's index tensor as a plan, another batch size, and a plan with a generator."""
    _, plan = batch_shuffle(torch.ones(4))
    for wrong in (torch.arange(4), None):
        with pytest.raises(TypeError, match="batch_unshuffle: plan must be what batch_shuffle"):
            batch_unshuffle(torch.ones(4), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch of 5 samples; the plan is for 4 samples"):
        batch_unshuffle(torch.ones(5), plan)
    with pytest.raises(ValueError, match=r"batch_shuffle: batch of 5 samples; the plan is for 4"):
        batch_shuffle(torch.ones(5), plan=plan)
    with pytest.raises(ValueError, match="generator must be None"):
        batch_shuffle(torch.ones(4), plan=plan, generator=torch.Generator())
    with pytest.raises(TypeError, match=r"two ints, seed and step, got \(1, 2.5\)"):
        set_shuffle_state((1, 2.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*62"):
        set_shuffle_state((1, -1))


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be from 1 to 2**62, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int, got 2.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"batch_size": 2, "seed": -1}, ValueError, "seed must be from 0 to 2**62, got -1"),
        ({"batch_size": 2, "seed": None}, TypeError, "seed must be an int, got None"),
    ],
)
def test_bad_options_of_the_sampler_are_refused(
    options: dict[str, Any], error: type[Exception], rule: str
) -> None:
    """Catches an error that comes much later, from the arithmetic of a permutation."""
    with pytest.raises(error, match=re.escape(f"ShuffledPairSampler: {rule}")):
        ShuffledPairSampler(range(8), **options)


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
