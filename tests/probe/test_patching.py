"""Modules that mix are found where they are, and patched passes are the real ones at both ends."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.audited import MIXING, After, Both, planted
from probe.known_leaks import one_thread
from shuffle_batchnorm import ShuffledEncoder
from shuffle_batchnorm.probe.patching import (
    Calls,
    Rows,
    candidates,
    find_mixing,
    interposed,
    patched,
    recording,
)

__all__ = ["one_thread"]  # a fixture

ROWS = Rows(8, torch.tensor([1, 6]))


def _recorded(model: nn.Module, base: Tensor, fresh: Tensor) -> tuple[Calls, Calls]:
    modules = candidates([model]).values()
    with torch.no_grad():
        with recording(modules) as calls:
            model(fresh)
        players = find_mixing(lambda: model(base), modules, ROWS, calls, [], lambda said: said)
        with recording(players) as base_calls:
            model(base)
    return base_calls, calls


def _batches() -> tuple[Tensor, Tensor]:
    base, fresh = torch.randn(2, 8, 8)
    fresh[ROWS.probes] = base[ROWS.probes]
    return base, fresh


@pytest.mark.parametrize("kind", MIXING)
def test_the_innermost_module_that_mixes_is_found(kind: str) -> None:
    """Catches a container that is blamed for what a module inside it does, and the reverse."""
    model, name = planted(kind, 2)
    players, _ = _recorded(model, *_batches())
    names = {module: name for name, module in candidates([model]).items()}
    assert [names[player] for player in players] == [name]


@pytest.mark.parametrize("kind", MIXING)
def test_both_ends_are_real_passes_and_stacks_are_many_passes(kind: str) -> None:
    """The ends bit for bit, for their passes have the shapes of the real ones."""
    model, _ = planted(kind, 1)
    model.append(nn.Sequential(Both(), After(), nn.Linear(4, 3)))
    base, fresh = _batches()
    calls = _recorded(model, base, fresh)
    players = list(calls[0])
    assert len(players) == 5
    subsets = [[p for k, p in enumerate(players) if n >> k & 1] for n in range(32)]
    found = []
    with torch.no_grad():
        for subset in subsets:
            with patched(ROWS, *calls, [subset], stacked=False):
                found.append(model(base)[ROWS.probes])
        for batch, end in ((base, found[0]), (fresh, found[-1])):
            assert torch.equal(model(batch)[ROWS.probes], end)
        with patched(ROWS, *calls, subsets, stacked=True):
            stack = model(base[ROWS.probes.repeat(32)]).chunk(32)
    torch.testing.assert_close(list(stack), found)


def test_a_container_that_mixes_behind_a_layer_is_found() -> None:
    """Catches one whose own mixing is taken for that of the layer inside it."""
    model = After()
    players, _ = _recorded(nn.Sequential(nn.Linear(8, 4), model), *_batches())
    assert list(players) == [model.norm, model]


def test_a_shuffled_encoder_is_opaque() -> None:
    """Its modules see samples in another order, where rows can't be told apart."""
    encoder = ShuffledEncoder(nn.Sequential(nn.BatchNorm1d(8)))
    assert list(candidates([nn.Sequential(nn.Linear(8, 8), encoder)])) == ["Sequential", "0", "1"]


def test_two_roots_keep_their_names_apart() -> None:
    assert list(candidates([nn.Linear(1, 1), nn.Linear(1, 1)])) == ["Linear", "Linear'"]


def test_forward_is_put_back() -> None:
    """Also after an error, and where it was an attribute of the module."""
    plain, own = nn.Linear(2, 2), nn.Linear(2, 2)
    mine: Any = lambda x: x + 1  # noqa: E731
    own.forward = mine  # type: ignore[method-assign]
    with contextlib.suppress(OverflowError), interposed([plain, own], lambda *_: 7):
        assert (plain(1), own(1)) == (7, 7)
        raise OverflowError
    assert "forward" not in vars(plain)
    assert own.forward is mine


def test_arguments_without_rows_stay() -> None:
    rows = Rows(3, torch.tensor([1]))
    new = [torch.arange(3), torch.ones(5), "text"]
    old = [torch.arange(10, 13), torch.zeros(5), "other"]
    first, *others = rows.complete(new, old)
    assert first.tolist() == [10, 1, 12]
    assert others[0] is new[1]
    assert others[1] == "text"
    assert rows.complete(new, []) is new
