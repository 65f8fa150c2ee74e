"""Bad input on one rank: a clear error or a defined result on every rank, within seconds."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import truth
from ranks import impatient, new_group, run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, shuffle_batch_norm, shuffle_offset

SECONDS = 20.0  # a rank that waits in vain looks around every 2 s; the group's own limit is 30 s
COMMUNICATING = ["sync", "swap", "regroup"]


def _step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def _good(*shape: int) -> Tensor:
    return torch.randn(shape or (8, 4, 3, 3))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "not divisible": (lambda: _good(6, 4, 3, 3), r"batch 6 is not divisible by groups=4"),
    "one dimension": (lambda: _good(8), r"at least 2 dimensions, got 1"),
    "channels": (lambda: _good(8, 5, 3, 3), r"input has 5 channels"),
    "integers": (lambda: torch.ones(8, 4, dtype=torch.int64), r"floating-point tensor"),
    "no tensor": (lambda: "batch", r"floating-point tensor, got str"),
    "dtype": (lambda: _good().double(), r"input is torch.float64, weight is torch.float32"),
}


def _fails(bad: str, mode: str, good_steps: int) -> tuple[float, str]:
    """Rank 1 gets bad input after some good steps; every rank says what it saw and when."""
    group = new_group()
    layers = [ShuffleBatchNorm(4, mode=mode, groups=4, process_group=group) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    for _ in range(good_steps):
        _step(model, _good())
    before = [b.clone() for b in model.buffers()]
    x = BAD[bad][0]() if dist.get_rank() == 1 else _good()
    start = time.monotonic()
    try:
        with impatient():
            _step(model, x)
    except (ValueError, TypeError, RuntimeError) as error:
        if dist.get_rank() == 1:
            assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        return time.monotonic() - start, f"{type(error).__name__}: {error}"
    return time.monotonic() - start, "nothing"


def _expect_everywhere(results: list[tuple[float, str]], message: str) -> None:
    """Rank 1 names value and rule; every other rank ends with an error that says who failed."""
    for rank, (seconds, text) in enumerate(results):
        assert "Error: shuffle_batch_norm: " in text, f"rank {rank}: {text}"
        assert seconds < SECONDS, f"rank {rank} took {seconds:.0f} s"
    assert results[1][1].startswith(("ValueError", "TypeError"))
    assert re.search(message, results[1][1])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mode", COMMUNICATING)
def test_bad_input_at_the_first_call_is_quoted_on_every_rank(bad: str, mode: str) -> None:
    """Catches a rank that raises alone: its peers would wait for it until the group's timeout."""
    results = run_on_ranks(3, _fails, bad, mode, good_steps=0)
    message = BAD[bad][1]
    _expect_everywhere(results, message)
    for rank in (0, 2):
        assert re.search(message, results[rank][1]), "the peers don't say what was wrong"


@pytest.mark.parametrize(("bad", "mode"), [*zip(BAD, COMMUNICATING * 2, strict=True)])
def test_bad_input_at_a_later_step_ends_every_rank(bad: str, mode: str) -> None:
    """Catches a check made only once; of three ranks one is no neighbour of the bad one."""
    _expect_everywhere(run_on_ranks(3, _fails, bad, mode, good_steps=2), BAD[bad][1])


def _goes_on_after_an_error(mode: str) -> int:
    layer = ShuffleBatchNorm(4, mode=mode, groups=2, process_group=new_group())
    for x in (_good(), _good(7, 4), _good(), _good()):
        try:
            with impatient():
                layer(x)
        except (ValueError, RuntimeError):
            time.sleep(0.5 * dist.get_rank())  # longer than a waiting rank is patient
    assert layer.num_batches_tracked is not None
    return int(layer.num_batches_tracked)


@pytest.mark.parametrize("mode", COMMUNICATING)
def test_a_caught_error_does_not_spoil_the_next_step(mode: str) -> None:
    """Catches a notice of failure that outlives the failure, and an update by a failed step."""
    assert run_on_ranks(2, _goes_on_after_an_error, mode) == [3, 3]


def _goes_on_after_a_rejection(mode: str) -> tuple[str, int]:
    layer = ShuffleBatchNorm(4, mode=mode, groups=2, process_group=new_group())
    texts = []
    for step in range(4):
        bad = step == 1 and dist.get_rank() == 1
        try:
            layer(_good(7, 4) if bad else _good())
        except (ValueError, RuntimeError) as error:
            texts.append(str(error))
    (text,) = texts
    assert layer.num_batches_tracked is not None
    return text, int(layer.num_batches_tracked)


@pytest.mark.parametrize("mode", COMMUNICATING)
def test_a_rejection_ends_the_step_of_both_ranks_and_no_more(mode: str) -> None:
    """Catches a rank that rejects its input without a word in the exchange its peer is in."""
    (peer, steps), (own, own_steps) = run_on_ranks(2, _goes_on_after_a_rejection, mode)
    assert "a peer of rank 0 rejected its input in this call" in peer
    assert "batch 7 is not divisible by groups=2" in own
    assert steps == own_steps == 3


DISAGREEMENTS: dict[str, list[dict[str, Any]]] = {
    "channels": [dict(num_features=4), dict(num_features=6)],
    "dtype": [dict(dtype=torch.float32), dict(dtype=torch.float64)],
    "mode": [dict(mode="swap"), dict(mode="regroup")],
    "groups": [dict(groups=2), dict(groups=4)],
    "offset": [dict(offset=1), dict(offset=3)],
    "blocks": [dict(mode="regroup", blocks=8), dict(mode="regroup", blocks=4)],
}


def _disagrees(options: list[dict[str, Any]]) -> str:
    group = new_group()
    mine = {"num_features": 4, "groups": 2, **options[dist.get_rank() == 1]}
    layer = ShuffleBatchNorm(**mine, process_group=group)
    x = torch.randn(8, mine["num_features"], dtype=mine.get("dtype", torch.float32))
    with pytest.raises(ValueError, match="shuffle_batch_norm: ranks disagree on ") as caught:
        layer(x)
    return str(caught.value)


@pytest.mark.parametrize("what", DISAGREEMENTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_disagree_all_say_so(what: str, world_size: int) -> None:
    """Catches peers that wait for, or misread, messages of another size or another sender."""
    for message in run_on_ranks(world_size, _disagrees, DISAGREEMENTS[what]):
        assert f"ranks disagree on {what}: " in message
        assert "on rank 0" in message
        assert "on rank 1" in message


def _one_value(mode: str) -> str:
    x = torch.randn(1 if dist.get_rank() == 1 else 4, 3, requires_grad=True)
    start, group = time.monotonic(), new_group()
    try:
        with impatient():
            y = shuffle_batch_norm(x, None, None, training=True, mode=mode, process_group=group)
            y.sum().backward()
    except (ValueError, RuntimeError) as error:
        assert time.monotonic() - start < SECONDS
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_one_value_per_channel_ends_the_rank_that_would_use_it() -> None:
    """Catches a division by the deviation of a single value (pytorch#37133)."""
    swap = run_on_ranks(3, _one_value, "swap")
    assert swap[0].startswith("ValueError: shuffle_batch_norm: expected more than 1 value")
    assert "got 1 in group 1, which normalises group 0 on rank 0" in swap[0]
    assert all("stopped: shuffle_batch_norm: expected more than 1" in text for text in swap[1:])
    assert "in group 1, which normalises group 1" in run_on_ranks(2, _one_value, "local")[1]
    # Pooled with others, one value is as good as any.
    assert run_on_ranks(3, _one_value, "sync") == ["fine"] * 3
    assert run_on_ranks(3, _one_value, "regroup") == ["fine"] * 3


def _empty_rank(mode: str, empty: list[int], needs_gradient: bool) -> Any:
    rank = dist.get_rank()
    layer = ShuffleBatchNorm(3, mode=mode, dtype=torch.float64)
    x = torch.randn(0 if rank in empty else 6, 3, 2, dtype=torch.float64) + rank
    x.requires_grad_(needs_gradient or rank not in empty)
    y = layer(x)
    y.pow(3).sum().backward()
    return x.detach(), y.detach(), x.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("mode", ["sync", "regroup"])
def test_an_empty_batch_on_one_rank_is_left_out(mode: str, needs_gradient: bool) -> None:
    """Catches a count of 0 that poisons the others, and a rank that skips backward (#36530)."""
    results = run_on_ranks(3, _empty_rank, mode, [1], needs_gradient)
    xs = [result[0].requires_grad_() for result in results]
    plain = truth.shuffled(xs, mode)
    torch.cat(plain.outputs).pow(3).sum().backward()
    for rank, (x, (_, y, grad, mean, var)) in enumerate(zip(xs, results, strict=True)):
        torch.testing.assert_close(y, plain.outputs[rank].detach(), rtol=1e-10, atol=1e-10)
        if len(x):
            torch.testing.assert_close(grad, x.grad, rtol=1e-10, atol=1e-10)
        if len(x) or mode == "sync":
            truth_mean, truth_var = truth.running(plain, [rank if len(x) else 0])
            torch.testing.assert_close(mean, truth_mean)
            torch.testing.assert_close(var, truth_var)
        else:
            assert not mean.any()


@pytest.mark.parametrize("mode", ["local", *COMMUNICATING])
def test_an_empty_batch_on_all_ranks_changes_nothing(mode: str) -> None:
    """Catches 0 / 0 in running statistics."""
    for _, y, _, mean, var in run_on_ranks(2, _empty_rank, mode, [0, 1], needs_gradient=True):
        assert y.shape == (0, 3, 2)
        assert mean.eq(0).all()
        assert var.eq(1).all()


def _empty_normaliser() -> str:
    rank = dist.get_rank()
    x = torch.randn(0 if rank == 1 else 6, 3, 2, requires_grad=True)
    group = new_group()
    try:
        with impatient():
            y = shuffle_batch_norm(x, None, None, training=True, mode="swap", process_group=group)
            y.sum().backward()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_swap_can_not_use_the_statistics_of_an_empty_batch() -> None:
    """Catches samples normalised with a mean of nothing."""
    user, *others = run_on_ranks(3, _empty_normaliser)
    assert user.startswith("ValueError: shuffle_batch_norm: expected more than 1 value")
    assert "got 0 in group 1, which normalises group 0 on rank 0" in user
    assert all("rank 0 stopped: shuffle_batch_norm: expected more" in text for text in others)


def _outside_the_group() -> str:
    group = dist.new_group([0])
    layer = ShuffleBatchNorm(4, groups=2, process_group=group)
    layer.eval()(_good())
    try:
        layer.train()(_good())
    except RuntimeError as error:
        return str(error)
    return "a member"


def test_a_rank_outside_the_group_is_told() -> None:
    """Catches a rank that joins collectives of a group that it is not in."""
    inside, outside = run_on_ranks(2, _outside_the_group)
    assert inside == "a member"
    assert "shuffle_batch_norm: rank 1 is not a member of the process_group" in outside


def _spread(mode: str, value: float) -> list[bool]:
    x = torch.randn(8, 3)
    if dist.get_rank() == 1:
        x[5, 2] = value  # in group 3 of 4, the second of its two blocks of two samples
    y = shuffle_batch_norm(x, None, None, training=True, mode=mode, groups=2, blocks=2)
    assert torch.isfinite(y[:, :2]).all(), "another channel is touched"
    return (~torch.isfinite(y[:, 2])).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_go_where_the_mixing_sends_them(value: float) -> None:
    """Catches a mix by multiplication with zeros, which spreads NaN to everybody."""
    modes = ("local", *COMMUNICATING)
    spread = {
        m: [bad for rank in run_on_ranks(2, _spread, m, value) for bad in rank] for m in modes
    }
    samples = range(16)  # sample 13 is bad; groups of 4, blocks of 2
    assert spread["local"] == [s // 4 == 3 for s in samples]
    assert spread["sync"] == [True for _ in samples]
    # Group 2 uses the statistics of group 3; the sample itself is NaN or inf wherever it goes.
    assert spread["swap"] == [s // 4 == 2 or s == 13 for s in samples]
    # Block 0 of group 3 is in new group 3 with block 1 of group 2.
    assert spread["regroup"] == [s in (12, 13, 10, 11) for s in samples]


def _only_one_rank_changes_its_offset() -> str:
    layer = ShuffleBatchNorm(4, groups=4)
    _step(layer, _good())
    with shuffle_offset(layer, 2 if dist.get_rank() == 1 else 3):
        try:
            _step(layer, _good())
        except ValueError as error:
            return str(error)
    return "nothing"


def test_offsets_that_differ_in_a_context_are_found() -> None:
    """Catches a comparison made for the first offset only."""
    for message in run_on_ranks(2, _only_one_rank_changes_its_offset):
        assert "ranks disagree on offset: 3 on rank 0, 2 on rank 1" in message
