"""ShuffledEncoder and hooks inside: a warning for what sees shuffled samples, and the way back."""

import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as hooks_on_all
from torch.utils.flop_counter import FlopCounterMode

from ranks import run_on_ranks
from shuffle.networks import inputs, network
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    batch_shuffle,
    batch_unshuffle,
    set_shuffle_state,
)
from shuffle_batchnorm.shuffle.permutations import Key, samples_sent_to


def _encoder() -> ShuffledEncoder:
    layers = nn.Linear(3, 4), ShuffleBatchNorm(4, mode="local", groups=2), nn.Linear(4, 2)
    return ShuffledEncoder(nn.Sequential(*layers))


def _warnings_of(encoder: nn.Module, calls: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            encoder(torch.randn(8, 3, requires_grad=True)).sum().backward()
    return [str(warning.message) for warning in caught]


def _listen(*_: Any, **__: Any) -> None:
    """A hook of every kind."""


class _Listener:
    def __call__(self, *_: Any, **__: Any) -> None:
        """A hook that is an object."""

    def listen(self, *_: Any, **__: Any) -> None:
        """A hook that is a method."""


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(_listen),
    "forward_kwargs": lambda m: m.register_forward_hook(_listen, with_kwargs=True),
    "forward_always": lambda m: m.register_forward_hook(_listen, always_call=True),
    "forward_pre": lambda m: m.register_forward_pre_hook(_listen),
    "forward_pre_kwargs": lambda m: m.register_forward_pre_hook(_listen, with_kwargs=True),
    "full_backward": lambda m: m.register_full_backward_hook(_listen),
    "full_backward_pre": lambda m: m.register_full_backward_pre_hook(_listen),
    "all_forward": lambda _: hooks_on_all.register_module_forward_hook(_listen),
    "all_forward_pre": lambda _: hooks_on_all.register_module_forward_pre_hook(_listen),
    "all_backward": lambda _: hooks_on_all.register_module_full_backward_hook(_listen),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_inside_is_warned_of_once(way: str) -> None:
    """Catches features of other ranks' samples, in silence (byol-pytorch#50)."""
    encoder = _encoder()
    place = "all modules" if way.startswith("all") else "'2'"
    handle = WAYS[way](encoder.encoder[2])
    try:
        (text,) = _warnings_of(encoder, calls=3)
    finally:
        handle.remove()
    assert text == (
        "ShuffledEncoder: hooks inside the encoder see samples of all ranks in shuffled order: "
        f"_listen on {place}. In a forward hook, batch_unshuffle(output, "
        "shuffled_encoder.current_plan) brings them back, called on all ranks"
    )


def test_hooks_of_a_later_time_are_warned_of_by_themselves() -> None:
    """Catches a check at the first call alone, and old hooks in the text for a new one."""
    encoder = _encoder()
    assert _warnings_of(encoder) == []
    encoder.encoder[0].register_forward_hook(_Listener())
    (first,) = _warnings_of(encoder, calls=2)
    assert "order: _Listener on '0'. In" in first
    encoder.encoder.register_forward_hook(functools.partial(_listen, None))
    encoder.encoder[1].register_forward_pre_hook(_Listener().listen)
    (second,) = _warnings_of(encoder, calls=2)
    assert "order: _listen on '', _Listener.listen on '1'. In" in second
    for _ in range(5):
        encoder.encoder[2].register_forward_hook(_listen)
    (third,) = _warnings_of(encoder, calls=2)
    assert "order: _listen on '2', _listen on '2', _listen on '2' and 2 more. In" in third


def test_hooks_that_see_nothing_shuffled_are_no_news() -> None:
    """Catches a false alarm: outside, in eval mode, of a state, of torch's own and of ours."""
    encoder = _encoder()
    encoder.register_forward_hook(_listen)
    encoder.register_full_backward_hook(_listen)
    encoder.encoder[0].register_state_dict_pre_hook(_listen)
    nn.utils.spectral_norm(encoder.encoder[0])  # an object
    encoder.encoder[0].unused = nn.Identity()
    encoder.encoder[0].unused.register_forward_hook(functools.partial(torch.is_tensor))
    encoder.encoder[0].unused.register_forward_hook(batch_shuffle)
    with FlopCounterMode(display=False):  # methods, on all modules
        assert _warnings_of(encoder) == []
    encoder.encoder[0].register_forward_hook(_listen)
    assert _warnings_of(encoder.eval()) == []


def test_modules_are_searched_only_after_a_new_hook() -> None:
    """Catches a walk through the encoder at every step."""
    encoder = _encoder()
    encoder(torch.randn(8, 3))
    with mock.patch.object(nn.Sequential, "named_modules") as walk:
        encoder(torch.randn(8, 3))
        assert not walk.called


def test_the_warning_names_the_callers_line() -> None:
    encoder = _encoder()
    encoder.encoder[2].register_forward_hook(_listen)
    with pytest.warns(UserWarning, match="hooks inside the encoder") as caught:
        encoder(torch.randn(8, 3))
    assert caught[0].filename == __file__


def test_there_is_a_plan_while_the_encoder_runs_and_only_then() -> None:
    """Catches a plan that outlives its call: a hook would take it for that of the next."""
    encoder, plans = _encoder(), []
    encoder.encoder[2].register_forward_hook(lambda *_: plans.append(encoder.current_plan))
    encoder.register_forward_hook(lambda *_: plans.append(encoder.current_plan))
    _warnings_of(encoder, calls=2)
    assert [plan and plan.sizes for plan in plans] == [(8,), None] * 2
    assert plans[0] is not plans[2]
    encoder.eval()(torch.randn(8, 3))
    assert plans[4:] == [None, None]
    encoder.train().encoder[2].weight = nn.Parameter(torch.randn(2, 9))  # does not fit
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        encoder(torch.randn(8, 3))
    assert encoder.current_plan is None


def _saved(encoder: ShuffledEncoder) -> ShuffledEncoder:
    buffer = io.BytesIO()
    torch.save(encoder, buffer)
    buffer.seek(0)
    twin: ShuffledEncoder = torch.load(buffer, weights_only=False)
    return twin


class _Copier:
    """A forward pre-hook that copies the encoder around it."""

    def __init__(self, encoder: ShuffledEncoder, copied: Callable[[Any], Any]) -> None:
        self.encoder, self.copied = encoder, copied

    def __call__(self, *_: Any) -> None:
        self.twin = self.copied(self.encoder)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, _saved])
def test_copies_made_during_a_call_are_in_none(copied: Callable[[Any], Any]) -> None:
    """Catches a copy that can't be made, one that holds a plan for ever, and one that is silent."""
    encoder = _encoder()
    copier = _Copier(encoder, copied)
    encoder.encoder[2].register_forward_pre_hook(copier)
    _warnings_of(encoder)
    assert copier.twin.current_plan is None
    (text,) = _warnings_of(copier.twin)
    assert "order: _Copier on '2'. In" in text


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_plan_is_there_in_a_compiled_graph() -> None:
    """Catches a graph break, and a hook that was traced with no plan."""
    encoder = _encoder()
    seen = []

    def bring_back(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert encoder.current_plan is not None
        seen.append(batch_unshuffle(output.detach().clone(), encoder.current_plan))

    encoder.encoder[2].register_forward_hook(bring_back)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y = compiled(torch.randn(8, 3))
        torch.testing.assert_close(seen.pop(), y)
    assert encoder.current_plan is None


def _brought_back(sizes: list[int], step: int) -> tuple[list[Tensor], list[Tensor]]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    x = inputs(sizes)[rank]
    set_shuffle_state((7, step))
    encoder, raw, back = ShuffledEncoder(network()), [], []

    def bring_back(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert encoder.current_plan is not None
        raw.append(output.clone())
        back.append(batch_unshuffle(output, encoder.current_plan))

    # What enters the first layer, and features from inside.
    for layer in (encoder.encoder[0], encoder.encoder[3]):
        layer.register_forward_hook(bring_back)
    with pytest.warns(UserWarning, match=r"hooks inside the encoder .*bring_back on '0'"):
        encoder(x)
    assert torch.equal(back[0], network()[0](x))  # the first layer mixes no samples
    assert not torch.equal(raw[0], back[0])
    return back, raw


@pytest.mark.filterwarnings("ignore:ShuffledEncoder. the shuffle does nothing")  # on one rank
@pytest.mark.parametrize("sizes", [[8], [4, 4], [3, 5], [6, 6, 6], [4, 3, 5]], ids=str)
def test_a_hook_brings_its_rows_back(sizes: list[int]) -> None:
    """Catches a plan of another call or rank, on every number of ranks and uneven batches."""
    if len(sizes) == 1:
        results = [_brought_back(sizes, 3)]
    else:
        results = run_on_ranks(len(sizes), _brought_back, sizes, 3)
    orders = [samples_sent_to(rank, Key(7, 3), sizes) for rank in range(len(sizes))]
    for layer in range(2):
        everything = torch.cat([back[layer] for back, _ in results])
        for order, (_, raw) in zip(orders, results, strict=True):
            assert torch.equal(everything[order], raw[layer])
