"""What PyTorch checks of each of its modules, on its own inputs for BatchNorm1d, 2d and 3d.

The inputs are part of the installed torch (``module_db``); the checks are those of its
``test_modules.py``, which is not, in our words. Every mode, constructed and converted.
"""

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.modules.batchnorm import _BatchNorm

import truth
from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.norm.mixing import MODES

with (
    mock.patch("torch.backends.disable_global_flags"),  # which other tests may want to set
    warnings.catch_warnings(),
):
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import module_db

INFOS = {info.module_cls: info for info in module_db}
pytestmark = [
    pytest.mark.parametrize("converted", [False, True], ids=["constructed", "converted"]),
    pytest.mark.parametrize("mode", MODES),
    pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]),
]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])


def _options(mode: str) -> dict[str, Any]:
    return dict(mode=mode, groups=1 if mode == "sync" else 2)


def _build(
    kind: Callable[..., nn.Module], mode: str, converted: bool, *args: Any, **kwargs: Any
) -> ShuffleBatchNorm:
    layer = (kind if converted else partial(ShuffleBatchNorm, **_options(mode)))(*args, **kwargs)
    if converted:
        layer = ShuffleBatchNorm.convert_shuffle_batchnorm(layer, **_options(mode))
    assert isinstance(layer, ShuffleBatchNorm)
    return layer


def _cases(
    kind: type[_BatchNorm],
    mode: str,
    converted: bool,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[ShuffleBatchNorm, _BatchNorm, Tensor]]:
    """The layer, the one it stands in for with the same parameters, and an input."""
    entries = INFOS[kind].module_inputs_func(
        INFOS[kind], device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    for entry in entries:
        args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        plain = kind(*args, **{**kwargs, "dtype": dtype}).train(training)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        layer = _build(kind, mode, converted, *args, **kwargs, dtype=dtype).train(training)
        layer.load_state_dict(plain.state_dict())
        yield layer, plain, entry.forward_input.args[0]


def _grads(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def _assert_same_tensors(got: nn.Module, want: nn.Module) -> None:
    assert [n for n, _ in got.named_parameters()] == [n for n, _ in want.named_parameters()]
    torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=0, atol=0)


@TRAINING
@DTYPE
def test_forward(
    kind: type[_BatchNorm], mode: str, converted: bool, training: bool, dtype: torch.dtype
) -> None:
    for layer, plain, x in _cases(kind, mode, converted, training, dtype):
        if training:
            groups = x.detach().chunk(layer.groups) if len(x) else [x.detach()] * layer.groups
            want = torch.cat(
                truth.shuffled(
                    groups, mode, weight=layer.weight, bias=layer.bias, eps=layer.eps
                ).outputs
            )
        else:
            want = plain(x)
        torch.testing.assert_close(layer(x), want)


@TRAINING
def test_repr(kind: type[_BatchNorm], mode: str, converted: bool, training: bool) -> None:
    for layer, plain, _ in _cases(kind, mode, converted, training):
        assert plain.extra_repr() in repr(layer)
        assert str(layer) == repr(layer)


@TRAINING
def test_copies(kind: type[_BatchNorm], mode: str, converted: bool, training: bool) -> None:
    """Pickled or deeply copied after a call, it goes on as the original does."""
    for layer, _, x in _cases(kind, mode, converted, training):
        layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies = [torch.load(file, weights_only=False), copy.deepcopy(layer)]
        want = layer(x)
        for twin in copies:
            torch.testing.assert_close(twin(x), want, rtol=0, atol=0)
            _assert_same_tensors(twin, layer)


def test_state_dict(kind: type[_BatchNorm], mode: str, converted: bool) -> None:
    for layer, plain, _ in _cases(kind, mode, converted):
        plain.load_state_dict(layer.state_dict())
        _assert_same_tensors(layer, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_factory_arguments(
    kind: type[_BatchNorm], mode: str, converted: bool, dtype: torch.dtype
) -> None:
    """Device and dtype reach every tensor, from arguments and from a default device."""
    for entry in INFOS[kind].module_inputs_func(
        INFOS[kind], device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        plain = kind(*args, **{**kwargs, "dtype": dtype})
        layers = [_build(kind, mode, converted, *args, **kwargs, device="meta", dtype=dtype)]
        with torch.device("meta"):
            layers.append(_build(kind, mode, converted, *args, **kwargs, dtype=dtype))
        for layer in layers:
            found = {n: (t.dtype, t.shape, t.is_meta) for n, t in layer.state_dict().items()}
            assert found == {n: (t.dtype, t.shape, True) for n, t in plain.state_dict().items()}
            empty = layer.to_empty(device="cpu")
            assert not any(t.is_meta for t in empty.state_dict().values())


@TRAINING
@pytest.mark.parametrize("swap", [False, True], ids=["set", "swapped"])
def test_to(kind: type[_BatchNorm], mode: str, converted: bool, training: bool, swap: bool) -> None:
    """To another dtype and back, by either of torch's ways of changing parameters."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for layer, _, x in _cases(kind, mode, converted, training):
            twin = copy.deepcopy(layer)
            parameters = list(layer.parameters())
            layer.to(torch.float64)
            assert {p.dtype for p in layer.parameters()} <= {torch.float64}
            torch.testing.assert_close(layer(x.double()), twin(x).double(), rtol=1e-4, atol=1e-4)
            layer.to(torch.float32)
            torch.testing.assert_close(layer.float()(x), twin(x))
            assert all(p is q for p, q in zip(layer.parameters(), parameters, strict=True))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@TRAINING
@DTYPE
def test_non_contiguous_tensors(
    kind: type[_BatchNorm], mode: str, converted: bool, training: bool, dtype: torch.dtype
) -> None:
    def spread(tensor: Tensor) -> Tensor:
        return tensor.detach().repeat_interleave(2, dim=-1)[..., ::2]

    for layer, _, x in _cases(kind, mode, converted, training, dtype):
        dy = torch.randn_like(x)
        state = copy.deepcopy(layer.state_dict())
        want = _grads(layer, x, dy)
        for input, dy_ in itertools.product((x, spread(x)), (dy, spread(dy))):
            layer.load_state_dict(state)
            got = _grads(layer, input.detach().requires_grad_(), dy_)
            torch.testing.assert_close(got, want)


@TRAINING
def test_memory_format(kind: type[_BatchNorm], mode: str, converted: bool, training: bool) -> None:
    """Output and gradient are laid out as the input is, whatever the layer was converted to."""
    last = {nn.BatchNorm2d: torch.channels_last, nn.BatchNorm3d: torch.channels_last_3d}
    formats = [torch.contiguous_format, last.get(kind, torch.contiguous_format)]
    for layer, _, x in _cases(kind, mode, converted, training):
        dy = torch.randn_like(x)
        want = _grads(layer, x, dy)
        for of_layer, of_input in itertools.product(formats, formats):
            layer.to(memory_format=of_layer)  # type: ignore[call-overload]
            input = x.detach().contiguous(memory_format=of_input).requires_grad_()
            got = _grads(layer, input, dy.contiguous(memory_format=of_input))
            torch.testing.assert_close(got, want)
            assert all(t.is_contiguous(memory_format=of_input) for t in got[:2])


@TRAINING
def test_grad(kind: type[_BatchNorm], mode: str, converted: bool, training: bool) -> None:
    """Of all inputs together, and of x alone."""
    for layer, _, x in _cases(kind, mode, converted, training, torch.float64):
        parameters = list(layer.parameters())
        for needed in (parameters, []):
            for parameter in parameters:
                parameter.requires_grad_(parameter in set(needed))
            assert gradcheck(lambda x, *_: layer(x), (x, *needed), fast_mode=True)  # noqa: B023


@TRAINING
def test_gradgrad(kind: type[_BatchNorm], mode: str, converted: bool, training: bool) -> None:
    for layer, _, x in _cases(kind, mode, converted, training, torch.float64):
        if not training and layer.track_running_stats:
            inputs = (x, *layer.parameters())
            assert gradgradcheck(lambda x, *_: layer(x), inputs, fast_mode=True)  # noqa: B023
        elif training and x.numel():
            with pytest.raises(RuntimeError, match="double backward is not implemented"):
                gradgradcheck(lambda x, *_: layer(x), (x,), fast_mode=True)  # noqa: B023


def test_train_and_eval_differ(kind: type[_BatchNorm], mode: str, converted: bool) -> None:
    for layer, _, x in _cases(kind, mode, converted):
        trained = layer(x)
        if x.numel() and layer.track_running_stats:
            assert not torch.equal(layer.eval()(x), trained)
            assert torch.equal(layer(x), layer(x))


def test_errors(kind: type[_BatchNorm], mode: str, converted: bool) -> None:
    for entry in INFOS[kind].module_error_inputs_func(
        INFOS[kind], device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        case = entry.module_error_input
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        layer = _build(kind, mode, converted, *args, **kwargs)
        with pytest.raises(entry.error_type, match=entry.error_regex):
            layer(*case.forward_input.args)
