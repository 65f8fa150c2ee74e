"""A probe leaves no trace, and finds what it must not leave one in."""

import copy
import functools
import importlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.known_leaks import convolutional, one_thread
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    get_shuffle_state,
    measure_leak,
    set_shuffle_state,
    stability,
)
from shuffle_batchnorm.probe.isolation import all_modules, find_roots

__all__ = ["one_thread"]  # a fixture

SMALL: dict[str, Any] = dict(batch_size=16, batches=8, keys_per_batch=4, keys_per_pass=4)
# The global one, which augmentations still use.
NUMPY: Any = importlib.import_module("numpy.random")
IMAGES = torch.randn(40, 3, 6, 6)


class Key(nn.Module):
    """Changes all it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ShuffledEncoder(convolutional("local", groups=4))
        self.register_buffer("calls", torch.zeros(1))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls: Tensor = self.calls + 1  # another tensor instead of the buffer
        y: Tensor = self.inner(x) + torch.rand(1) + random.random() + NUMPY.rand()
        for module in self.modules():
            if isinstance(module, ShuffleBatchNorm):
                module.offset += 1
        self.inner.encoder.train()
        self.inner.encoder[1].eval()
        if self.fails and self.calls > 3:
            raise OverflowError("too many calls")
        return y


def _state(modules: list[nn.Module]) -> list[Any]:
    """All that must not change, in a form that can be compared; buffers with their addresses."""
    found = all_modules(modules).items()
    return [
        [(n, id(b), b.tolist()) for m in modules for n, b in m.named_buffers()],
        [(n, m.training, getattr(m, "offset", 0), getattr(m, "mode", "")) for n, m in found],
        [p.tolist() for m in modules for p in m.parameters()],
        get_shuffle_state(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(NUMPY.get_state()),
    ]


def _augment(x: Tensor) -> Tensor:
    noise: Tensor = torch.rand_like(x) + random.random() + NUMPY.rand()
    return x + noise


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("state", [None, (5, 7)])
def test_all_state_is_as_before(fails: bool, state: tuple[int, int] | None) -> None:
    """Also after an error; also a shuffle state that was not there."""
    query, key = convolutional("local", groups=4), Key()
    key.inner.encoder[4].eval()
    key.fails = fails
    set_shuffle_state(state)
    before = _state([query, key])
    probe = functools.partial(measure_leak, lambda x: 1 * query(x), key, IMAGES, _augment, **SMALL)
    if fails:
        with pytest.raises(OverflowError):
            probe()
    else:
        probe()
    assert _state([query, key]) == before
    assert get_shuffle_state() == state


@pytest.mark.parametrize("fails", [False, True])
def test_stability_leaves_all_state(fails: bool) -> None:
    key = Key().eval()
    ShuffleBatchNorm.convert_shuffle_batchnorm(key.inner.encoder, mode="regroup", groups=2)
    before = _state([key])
    key.fails, key.calls[0] = fails, 2
    before = _state([key])
    if fails:
        with pytest.raises(OverflowError):
            stability(key, IMAGES)
    else:
        stability(key, IMAGES)
    assert _state([key]) == before


def test_a_training_step_after_the_probe_is_the_one_without() -> None:
    def train(probe: bool) -> list[Tensor]:
        torch.manual_seed(4)
        model = nn.Sequential(convolutional("regroup", groups=4), nn.Dropout(0.5))
        if probe:
            measure_leak(model, model, IMAGES, _augment, **SMALL)
        model(IMAGES).square().sum().backward()
        return [
            *model.state_dict().values(),
            *(p.grad for p in model.parameters() if p.grad is not None),
        ]

    for with_probe, without in zip(train(True), train(False), strict=True):
        assert torch.equal(with_probe, without)


def test_modules_given_are_isolated_as_well() -> None:
    hidden = {"encoder": convolutional("local", groups=4)}

    def encode(x: Tensor) -> Tensor:
        return hidden["encoder"](x)  # type: ignore[no-any-return]

    for modules, changed in ([], True), ([hidden["encoder"]], False):
        before = copy.deepcopy(hidden["encoder"].state_dict())
        measure_leak(encode, encode, IMAGES, modules=modules, **SMALL)
        after = hidden["encoder"].state_dict()
        assert changed == any(not torch.equal(before[n], after[n]) for n in before)


class Trainer:
    """Has models and is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def encode(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]

    def __call__(self, x: Tensor) -> Tensor:
        return self.encode(x)


GLOBAL = nn.Linear(1, 1)


def test_modules_are_found_in_callables() -> None:
    """Catches running statistics that a probe moves because it did not see the model."""
    model = nn.Sequential(nn.Linear(2, 2))
    trainer = Trainer(model)
    partial = functools.partial(nn.Module.__call__, model)
    sources: list[Any] = [model, model.forward, partial, lambda x: 1 * model(x), trainer]
    sources += [
        trainer.encode,
        lambda x: 1 * trainer.encode(x),
        torch.no_grad()(lambda x: 1 * partial(x)),
    ]
    for source in sources:
        assert find_roots(source) == [model], source
    assert find_roots(lambda x: 1 * GLOBAL(x)) == [GLOBAL]
    assert find_roots(torch.relu) == find_roots(None) == []


def test_what_a_wrapper_hides_is_found() -> None:
    layer = ShuffleBatchNorm(3)
    assert list(all_modules([nn.Sequential(ShuffledEncoder(layer))]).values())[-1] is layer
