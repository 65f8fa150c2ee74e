"""MoCo in one process: the loss, the queue, and how the key encoder follows."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.moco.build import normalise_key, normalise_query
from shuffle_batchnorm.moco.config import Norm, NormConfig
from shuffle_batchnorm.moco.model import MoCo, Step, next_offset


class _Encoder(nn.Module):
    """Images [N, 1, 4, 4] to directions [N, 5]."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=1)


def _moco(bn: Norm = "regroup", groups: int = 4, **options: Any) -> MoCo:
    norm = NormConfig(bn=bn, groups=groups)
    query, key = normalise_query(_Encoder(), norm), normalise_key(_Encoder(seed=2), norm)
    return MoCo(query, key, **{**dict(queue=20, dim=5, temperature=0.2), **options})


def _views(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, 1, 4, 4, generator=generator)
    one, two = (base + 0.3 * torch.randn(n, 1, 4, 4, generator=generator) for _ in "12")
    return one, two


def _naive(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[float, float]:
    """Loss and accuracy, one query at a time."""
    losses, hits = [], []
    for q, k in zip(queries, keys, strict=True):
        positive, negatives = q @ k, queue @ q
        both = torch.cat([positive.view(1), negatives]) / temperature
        losses.append(both.exp().sum().log() - positive / temperature)
        hits.append(bool((positive > negatives).all()))
    return float(torch.stack(losses).mean()), sum(hits) / len(hits)


def test_loss_is_the_formula_with_the_queue_of_before() -> None:
    """Catches keys that are enqueued before they are negatives of their own queries."""
    moco = _moco()
    for seed in range(4):
        before = moco.queue.clone()
        step = moco(*_views(seed=seed))
        loss, accuracy = _naive(step.queries, step.keys, before, 0.2)
        assert float(step.loss.detach()) == pytest.approx(loss, rel=1e-5)
        assert float(step.accuracy) == pytest.approx(accuracy)


def test_negatives_in_the_batch_are_the_other_keys_of_the_step() -> None:
    """Catches a query's own key among its negatives, a queue that is read or filled, and NaN."""
    moco = _moco("simclr", in_batch=True, queue=1)
    queue = moco.queue.clone()
    one, two = _views()
    step = moco(one, two)
    pairs = list(zip(step.queries, step.keys, strict=True))
    others = [torch.cat([step.keys[:i], step.keys[i + 1 :]]) for i in range(8)]
    found = [
        _naive(q[None], k[None], negatives, 0.2)
        for (q, k), negatives in zip(pairs, others, strict=True)
    ]
    loss, accuracy = torch.tensor(found).mean(0).tolist()
    assert float(step.loss.detach()) == pytest.approx(loss, rel=1e-5)
    assert float(step.accuracy) == pytest.approx(accuracy)
    torch.testing.assert_close((moco.queue, int(moco.queue_pointer)), (queue, 0), rtol=0, atol=0)
    step.loss.backward()
    # The formula's gradient with all keys as constants.
    twin = normalise_query(_Encoder(), NormConfig(bn="simclr"))
    logits = twin(one) @ step.keys.T / 0.2
    F.cross_entropy(logits, torch.arange(8)).backward()
    for got, want in zip(moco.encoder_q.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_the_gradient_reaches_the_query_encoder_only() -> None:
    """Also catches a queue that is changed before the backward pass reads it."""
    moco = _moco()
    step = moco(*_views())
    step.loss.backward()
    assert all(p.grad is not None for p in moco.encoder_q.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in moco.encoder_k.parameters())
    assert not step.keys.requires_grad
    # That of the formula with the key and the queue as constants.
    twin = normalise_query(_Encoder(), NormConfig(groups=4))
    queries = twin(_views()[0])
    logits = torch.cat([(queries * step.keys).sum(1, keepdim=True), queries @ _moco().queue.T], 1)
    loss = (logits / 0.2).logsumexp(1) - logits[:, 0] / 0.2
    loss.mean().backward()
    for got, want in zip(moco.encoder_q.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_the_key_encoder_begins_as_the_query_encoder() -> None:
    moco = _moco("batch-shuffle")
    torch.testing.assert_close(
        dict(moco.encoder_k.state_dict()), dict(moco.encoder_q.state_dict()), rtol=0, atol=0
    )


def test_parameters_follow_before_the_keys_are_encoded() -> None:
    moco = _moco("local", momentum=0.9)
    with torch.no_grad():
        for parameter in moco.encoder_q.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = [p.clone() for p in moco.encoder_k.parameters()]
    one, two = _views()
    step = moco(one, two)
    pairs = list(zip(moco.encoder_q.parameters(), moco.encoder_k.parameters(), strict=True))
    for old, (query, key) in zip(before, pairs, strict=True):
        torch.testing.assert_close(key, 0.9 * old + 0.1 * query)
    torch.testing.assert_close(moco.encode_key(two), step.keys)


@pytest.mark.parametrize("bn", ["regroup", "batch-shuffle"])
@pytest.mark.parametrize("buffers", ["own", "copy", "momentum"])
def test_buffers(buffers: str, bn: Norm) -> None:
    moco = _moco(bn, buffers=buffers, momentum=0.9)
    one, two = _views()
    moco(one, two)
    query: Any
    key: Any
    query, key = (e.get_submodule("layers.1") for e in (moco.encoder_q, moco.encoder_k))
    mean, old = query.running_mean.clone(), key.running_mean.clone()
    moco(one, 3 + 2 * two)
    if buffers == "own":
        # A tenth of its own batch's mean, averaged over the groups: they are of one size.
        convolution: Any = moco.encoder_k.get_submodule("layers.0")
        batch = convolution(3 + 2 * two).mean((0, 2, 3))
        expected = 0.9 * old + 0.1 * batch
    elif buffers == "copy":
        expected = mean
    else:
        expected = 0.9 * old + 0.1 * mean
    torch.testing.assert_close(key.running_mean, expected)
    assert int(key.num_batches_tracked) == 2
    assert query.momentum == 0.1


def test_keys_of_eman_are_normalised_by_the_averages_of_earlier_steps() -> None:
    """Catches statistics of this step's batch, which its keys would then know a little of."""
    moco = _moco("eman", buffers="momentum", momentum=0.5)
    for seed in range(3):
        twin = copy.deepcopy(moco)
        twin.update_key()
        one, two = _views(seed=seed)
        key: Any = twin.encoder_k
        convolution, norm, *rest = key.layers
        images = convolution(two)
        mean, var = (t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var))
        normalised = (images - mean) / (var + 1e-5).sqrt()
        expected = F.normalize(nn.Sequential(*rest)(normalised), dim=1)
        torch.testing.assert_close(moco(one, two).keys, expected)
    assert norm.running_mean.abs().max() > 0.01


def test_queue_of_any_length_wraps_around() -> None:
    moco, expected = _moco(queue=11), list(_moco(queue=11).queue)
    slot = 0
    for seed in range(4):
        for key in moco(*_views(seed=seed)).keys:
            expected[slot % 11] = key
            slot += 1
        torch.testing.assert_close(moco.queue, torch.stack(expected))
    assert int(moco.queue_pointer) == 32 % 11
    torch.testing.assert_close(moco.queue.norm(dim=1), torch.ones(11))


def test_queue_begins_the_same_on_every_rank_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    first = MoCo(_Encoder(), _Encoder(), dim=5, seed=3).queue
    state = torch.get_rng_state()
    query, key = nn.Identity(), nn.Identity()
    again = MoCo(query, key, dim=5, seed=3).queue
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, MoCo(query, key, dim=5, seed=4).queue)


def test_queue_smaller_than_a_step() -> None:
    with pytest.raises(
        ValueError, match=r"^MoCo: queue 7 is smaller than the 1 ranks x 8 = 8 keys"
    ):
        _moco(queue=7)(*_views())
    with pytest.raises(ValueError, match="queue 15 is smaller than the 1 ranks x 16 = 16 keys"):
        _moco(queue=15, symmetric=True)(*_views())
    _moco(queue=8)(*_views())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(queue=0), "queue must be at least 1, got 0"),
        (dict(dim=0), "dim must be at least 1, got 0"),
        (dict(temperature=0.0), "temperature must be above 0, got 0.0"),
        (dict(momentum=1.5), "momentum must be from 0 to 1, got 1.5"),
        (dict(buffers="none"), "buffers must be one of own, copy, momentum, got 'none'"),
    ],
)
def test_options_out_of_range(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MoCo: {message}$"):
        _moco(**option)


def test_a_collapsed_encoder_recognises_nothing() -> None:
    """Every similarity is 1: a tie that argmax would give to the positive."""

    class Collapsed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(torch.ones(len(x), 5), dim=1)

    for in_batch in (False, True):
        moco = MoCo(Collapsed(), Collapsed(), queue=8, dim=5, in_batch=in_batch)
        moco(*_views())
        assert float(moco(*_views()).accuracy) == 0


def test_symmetric_is_both_directions_against_one_queue() -> None:
    one, two = _views()
    moco = _moco("local", symmetric=True)
    queue = moco.queue.clone()
    step = moco(one, two)
    there, back = _moco("local")(one, two), _moco("local")(two, one)
    torch.testing.assert_close(step.loss, (there.loss + back.loss) / 2)
    torch.testing.assert_close(step.accuracy, (there.accuracy + back.accuracy) / 2)
    torch.testing.assert_close(moco.queue, torch.cat([there.keys, back.keys, queue[16:]]))
    assert int(moco.queue_pointer) == 16


def test_symmetric_negatives_in_the_batch_are_of_one_view() -> None:
    """Catches keys of the first view that are told apart from those of the second."""
    one, two = _views()
    step = _moco("local", symmetric=True, in_batch=True)(one, two)
    there, back = (_moco("local", in_batch=True)(*views) for views in ((one, two), (two, one)))
    torch.testing.assert_close(step.loss, (there.loss + back.loss) / 2)
    torch.testing.assert_close(step.accuracy, (there.accuracy + back.accuracy) / 2)


def test_second_keys_have_other_samples() -> None:
    moco = _moco("regroup", symmetric=True)
    layer = next(m for m in moco.encoder_k.modules() if isinstance(m, ShuffleBatchNorm))
    offsets = []
    layer.register_forward_hook(lambda *call: offsets.append(call[0].offset))
    moco(*_views())
    assert offsets == [1, 3]
    assert layer.offset == 1


@pytest.mark.parametrize(
    ("offset", "total", "expected"),
    [(1, 32, 3), (1, 9, 2), (5, 8, 7), (7, 8, 9), (1, 2, 1), (1, 1, 1), (0, 8, 0), (-1, 8, 1)],
)
def test_next_offset(offset: int, total: int, expected: int) -> None:
    """Prime to G, so that no two samples of a group meet again, and another one modulo G."""
    if total > 2 and offset:
        assert (expected - offset) % total
    assert next_offset(offset, total) == expected


def test_state_dict_carries_the_queue() -> None:
    moco = _moco()
    moco(*_views())
    other = _moco(seed=9)
    other.load_state_dict(copy.deepcopy(moco.state_dict()))
    steps = [m(*_views(seed=1)) for m in (moco, other)]
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)
    torch.testing.assert_close(other.queue, moco.queue, rtol=0, atol=0)
    assert int(other.queue_pointer) == 16


def test_bfloat16_keeps_the_loss_and_the_queue_wide() -> None:
    moco = _moco()
    with torch.autocast("cpu", torch.bfloat16):
        step = moco(*_views())
    assert step.loss.dtype == torch.float32
    assert moco.queue.dtype == torch.float32
    exact = _moco()(*_views())
    torch.testing.assert_close(step.loss, exact.loss, rtol=0.05, atol=0.05)
    loss, _ = _naive(step.queries.float(), step.keys.float(), _moco().queue, 0.2)
    assert float(step.loss.detach()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"buffers": "momentum"}, {"symmetric": True}, {"in_batch": True}]
)
def test_a_step_never_asks_for_a_value(options: dict[str, Any]) -> None:
    """Tensors without content: .item() or a mask would raise, as they would wait for a GPU."""
    with FakeTensorMode():
        moco = _moco(**options)
        moco(*(torch.zeros(8, 1, 4, 4) for _ in "12")).loss.backward()


@pytest.mark.parametrize(
    ("bn", "symmetric"), [("sync", False), ("regroup", True), ("eman", False), ("simclr", True)]
)
def test_compiles_to_one_graph(bn: Norm, symmetric: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dynamo's, of its own code
        torch._dynamo.reset()
        mocos = [
            _moco(bn, symmetric=symmetric, buffers="momentum", in_batch=bn == "simclr")
            for _ in range(2)
        ]
        compiled = torch.compile(mocos[1], fullgraph=True, backend="aot_eager")
        for seed in range(3):
            steps: list[Step] = [run(*_views(seed=seed)) for run in (mocos[0], compiled)]
            for step in steps:
                step.loss.backward()
            torch.testing.assert_close(steps[1], steps[0])
        for got, want in zip(mocos[1].buffers(), mocos[0].buffers(), strict=True):
            torch.testing.assert_close(got, want)
        for got, want in zip(mocos[1].parameters(), mocos[0].parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad)
