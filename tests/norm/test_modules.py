"""The layer in one process: what it keeps of nn.BatchNorm, and its groups."""

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import truth
from shuffle_batchnorm import ShuffleBatchNorm, shuffle_batch_norm
from shuffle_batchnorm.norm.mixing import MODES

MODE = pytest.mark.parametrize("mode", MODES)
PLAIN = [
    pytest.param(nn.BatchNorm1d, (), id="1d-without-space"),
    pytest.param(nn.BatchNorm1d, (5,), id="1d"),
    pytest.param(nn.BatchNorm2d, (3, 4), id="2d"),
    pytest.param(nn.BatchNorm3d, (2, 3, 2), id="3d"),
]


def _pair(kind: type[_BatchNorm], mode: str, **kwargs: Any) -> tuple[_BatchNorm, ShuffleBatchNorm]:
    """A plain layer and one of ours with the same, not trivial, parameters."""
    plain, ours = kind(6, **kwargs), ShuffleBatchNorm(6, mode=mode, **kwargs)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def _step(layer: _BatchNorm, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    grads = [p.grad for p in layer.parameters()]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in layer.buffers())]


def _assert_same(got: list[Any], want: list[Any], rtol: float = 0, atol: float = 0) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)


@MODE
@pytest.mark.parametrize(("kind", "space"), PLAIN)
def test_one_group_is_batch_norm(kind: type[_BatchNorm], space: tuple[int, ...], mode: str) -> None:
    """Catches any difference from nn.BatchNorm in outputs, gradients, buffers, over 3 steps."""
    plain, ours = _pair(kind, mode)
    for n in (8, 4, 6):
        x, dy = torch.randn(n, 6, *space) * 3 + 1, torch.randn(n, 6, *space)
        _assert_same(_step(ours, x, dy), _step(plain, x, dy), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.003), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_are_never_in_half_precision(
    dtype: torch.dtype, error: float, affine: bool
) -> None:
    """Catches aten's batch norm of one group: it rounds statistics, as it would its parameters."""
    layer = ShuffleBatchNorm(
        3, mode="local", affine=affine, track_running_stats=affine, dtype=dtype
    )
    x = (torch.randn(64, 3, 8, 8) + 30).to(dtype)
    want = F.batch_norm(x.double(), None, None, training=True)
    assert (layer(x).double() - want).abs().max() < error


@pytest.mark.parametrize(
    "options",
    [
        dict(momentum=None),
        dict(momentum=0.0),
        dict(momentum=1.0),
        dict(eps=0.1),
        dict(affine=False),
        dict(track_running_stats=False),
        dict(track_running_stats=False, momentum=None),
        dict(affine=False, track_running_stats=False),
    ],
    ids=str,
)
def test_options_of_batch_norm(options: dict[str, Any]) -> None:
    """Catches options that differ from nn.BatchNorm (pytorch#54495, #50126, #194504)."""
    plain, ours = _pair(nn.BatchNorm2d, "local", **options)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for n in (8, 4, 6):
        x, dy = torch.randn(n, 6, 3, 4) * 3 + 1, torch.randn(n, 6, 3, 4)
        for layer in (plain, ours):
            layer.train()
        _assert_same(_step(ours, x, dy), _step(plain, x, dy), rtol=1e-5, atol=2e-6)
        for layer in (plain, ours):
            layer.eval()
        _assert_same(_step(ours, x, dy), _step(plain, x, dy), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_eval_is_batch_norm_bit_for_bit(dtype: torch.dtype) -> None:
    """Catches an eval mode of its own, or one whose batches must fit `groups`."""
    plain, ours = _pair(nn.BatchNorm2d, "swap")
    ours.groups = 4
    for layer in (plain, ours):
        layer.to(dtype).eval()
        layer.get_buffer("running_mean").copy_(torch.arange(6.0))
        layer.get_buffer("running_var").copy_(torch.arange(1.0, 7))
    for n in (1, 3, 7, 0):
        x = torch.randn(n, 6, 1, 1).to(dtype)
        y = F.batch_norm(x, ours.running_mean, ours.running_var, ours.weight, ours.bias)
        assert torch.equal(ours(x), y) or n == 0
        assert ours(x).shape == x.shape
        assert ours(x).dtype == dtype


def test_tracking_can_be_switched_off_later() -> None:
    """Catches buffers that still move after `layer.track_running_stats = False` (VAT does)."""
    plain, ours = _pair(nn.BatchNorm2d, "local")
    for switch in (True, False, True):
        for layer in (plain, ours):
            layer.__dict__["track_running_stats"] = switch
        x, dy = torch.randn(4, 6, 3, 4) + 1, torch.randn(4, 6, 3, 4)
        for mode in (True, False):
            plain.train(mode)
            ours.train(mode)
            _assert_same(_step(ours, x, dy), _step(plain, x, dy), rtol=1e-5, atol=2e-6)


def test_running_statistics_can_be_taken_away_later() -> None:
    """Catches an eval mode that insists on buffers: None means the batch's own statistics."""
    plain, ours = _pair(nn.BatchNorm2d, "local")
    x, dy = torch.randn(4, 6, 3, 4) + 1, torch.randn(4, 6, 3, 4)
    for layer in (plain, ours):
        layer.register_buffer("running_mean", None)
        layer.register_buffer("running_var", None)
    for mode in (True, False):
        plain.train(mode)
        ours.train(mode)
        _assert_same(_step(ours, x, dy), _step(plain, x, dy), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_modules_in_other_dtypes(dtype: torch.dtype) -> None:
    """Catches statistics in half precision, and float64 that passed through float32."""
    ours = ShuffleBatchNorm(6, mode="regroup", groups=2, dtype=dtype)
    exact = ShuffleBatchNorm(6, mode="regroup", groups=2, dtype=torch.float64)
    x, dy = ((torch.randn(16, 6, 16, 16) * 3 + 5).to(dtype) for _ in range(2))
    got, want = _step(ours, x, dy), _step(exact, x.double(), dy.double())
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for g, w in zip(got, want, strict=True):
        assert g is not None
        assert w is not None
        assert g.dtype in (dtype, torch.int64)
        assert (g.double() - w).norm() <= tolerance * w.double().norm()


def test_half_method() -> None:
    """Catches layers that can't change dtype after their first call, or in eval mode."""
    ours = ShuffleBatchNorm(6, groups=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ours.to(dtype)
        for mode in (True, False):
            y = ours.train(mode)(torch.randn(4, 6, 3, dtype=dtype))
            assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Catches statistics or parameters' gradients that autocast made half precision."""
    conv = nn.Conv2d(3, 6, 3)
    ours = ShuffleBatchNorm(6, mode="swap", groups=2)
    with torch.autocast("cpu", dtype):
        features = conv(torch.randn(8, 3, 18, 18).to(memory_format=memory_format)).detach()
        y = ours(features)
    assert features.dtype == y.dtype == dtype
    y.float().square().sum().backward()
    exact = truth.shuffled(list(features.double().chunk(2)), "swap")
    error = (y.double() - torch.cat(exact.outputs)).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps
    mean, var = truth.running(exact, range(2))
    _assert_same([*ours.buffers()][:2], [mean.float(), var.float()], rtol=1e-5, atol=1e-6)
    assert ours.weight.grad is not None
    assert ours.weight.grad.dtype == torch.float32


@MODE
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("space", [(), (3,), (2, 2)])
def test_groups_in_one_process(mode: str, groups: int, space: tuple[int, ...]) -> None:
    """Catches groups normalised by other groups than the mode says, on a single device."""
    for offset, blocks in itertools.product((1, 3, -2), (8, 3)):
        kwargs: dict[str, Any] = dict(mode=mode, groups=groups, offset=offset, blocks=blocks)
        layer = ShuffleBatchNorm(5, dtype=torch.float64, **kwargs)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        scale = torch.arange(1, 9).repeat_interleave(2).double().view(16, *[1] * (1 + len(space)))
        x = (torch.randn(16, 5, *space).double() * scale + scale).requires_grad_()
        dy = torch.randn(16, 5, *space).double()
        exact = truth.shuffled(
            list(x.chunk(groups)), mode, offset, blocks, layer.weight, layer.bias
        )
        y = torch.cat(exact.outputs)
        wanted = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* shuffles nothing")
            got = layer(x)
        _assert_same([got], [y], rtol=1e-10, atol=1e-10)
        grads = torch.autograd.grad(got, [x, *layer.parameters()], dy)
        _assert_same([*grads], [*wanted], rtol=1e-10, atol=1e-10)
        buffers = [*layer.buffers()][:2]
        _assert_same(buffers, [*truth.running(exact, range(groups))], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_state_dict_is_that_of_batch_norm(affine: bool, track: bool) -> None:
    """Catches checkpoints that load in one direction only."""
    plain = nn.BatchNorm2d(6, affine=affine, track_running_stats=track)
    ours = ShuffleBatchNorm(6, affine=affine, track_running_stats=track)
    plain(torch.randn(4, 6, 3, 3))
    theirs, mine = (
        [(k, v.shape, v.dtype) for k, v in m.state_dict().items()] for m in (plain, ours)
    )
    assert mine == theirs
    ours.load_state_dict(plain.state_dict())
    _assert_same([*ours.state_dict().values()], [*plain.state_dict().values()])
    plain.load_state_dict(
        ShuffleBatchNorm(6, affine=affine, track_running_stats=track).state_dict()
    )


def test_checkpoints_from_before_num_batches_tracked() -> None:
    """Catches a lost `_version`: old pretrained weights have no num_batches_tracked."""
    old = {k: v for k, v in nn.BatchNorm2d(6).state_dict().items() if k != "num_batches_tracked"}
    old["running_mean"] = torch.arange(6.0)
    ours = ShuffleBatchNorm(6)
    ours.load_state_dict(old)
    assert torch.equal(ours.get_buffer("running_mean"), torch.arange(6.0))
    assert ours.get_buffer("num_batches_tracked") == 0


def test_repr_tells_the_options() -> None:
    """Catches a printed model that hides how it shuffles."""
    layer = ShuffleBatchNorm(6, mode="regroup", groups=2, offset=3, blocks=4)
    theirs = repr(nn.BatchNorm2d(6)).removeprefix("BatchNorm2d(").removesuffix(")")
    options = "mode='regroup', groups=2, offset=3, blocks=4"
    assert repr(layer) == f"ShuffleBatchNorm({theirs}, {options})"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "copy"])
def test_copies(how: str) -> None:
    """Catches copies that share or lose options, or that carry a running recording with them."""
    layer = ShuffleBatchNorm(6, mode="regroup", groups=2, offset=3, blocks=4)
    layer(torch.randn(4, 6))
    twin = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "copy": copy.copy,
    }[how](layer)
    assert repr(twin) == repr(layer)
    assert (twin.weight is layer.weight) == (how == "copy")
    x = torch.randn(4, 6)
    torch.testing.assert_close(twin(x), layer(x))
    if how != "copy":
        with torch.no_grad():
            twin.weight.add_(1)
        assert not torch.equal(twin.weight, layer.weight)


def test_offset_that_is_a_multiple_of_the_groups_warns() -> None:
    """Catches a shuffle that does nothing in silence, and a warning where there is no need."""
    x = torch.randn(8, 6)
    plain = ShuffleBatchNorm(6, mode="local", groups=2)(x)
    for mode, offset in itertools.product(("swap", "regroup"), (2, -4)):
        layer = ShuffleBatchNorm(6, mode=mode, groups=2, offset=offset)
        with pytest.warns(UserWarning, match=rf"offset={offset} is a multiple of the 2 groups"):
            torch.testing.assert_close(layer(x), plain)
    with pytest.warns(UserWarning, match=r"blocks=1 leaves each group whole"):
        ShuffleBatchNorm(6, mode="regroup", groups=2, blocks=1)(x)
    # No warning, or it would be an error here: one group, or an offset of 0 by intention.
    for mode in MODES:
        ShuffleBatchNorm(6, mode=mode)(x)
        ShuffleBatchNorm(6, mode=mode, groups=2, offset=0)(x)


@pytest.mark.parametrize("training", [True, False])
def test_other_channels_than_num_features_are_refused(training: bool) -> None:
    """Catches a layer without parameters or buffers that takes any number of channels."""
    layer = ShuffleBatchNorm(4, affine=False, track_running_stats=False).train(training)
    with pytest.raises(ValueError, match=r"input has 5 channels, the layer has num_features=4"):
        layer(torch.randn(8, 5, 2))


def test_half_of_the_running_statistics_is_refused() -> None:
    """Catches an update skipped in silence."""
    with pytest.raises(ValueError, match=r"running_mean and running_var must be given together"):
        shuffle_batch_norm(torch.randn(8, 4), torch.zeros(4), None, training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
def test_what_follows_may_change_the_output_in_place(
    mode: str, groups: int, dtype: torch.dtype
) -> None:
    """Catches an output that is a view, which `nn.ReLU(inplace=True)` may not change."""
    for shape in [(8, 4), (8, 4, 5), (8, 4, 6, 6), (16, 64, 14, 14), (8, 4, 2, 2, 2)]:
        layer = ShuffleBatchNorm(shape[1], mode=mode, groups=groups, dtype=dtype)
        x = torch.randn(shape, dtype=dtype)
        formats = [torch.contiguous_format]
        formats += [torch.channels_last] if len(shape) == 4 else []
        for memory_format in formats:
            z = x.contiguous(memory_format=memory_format).requires_grad_()
            grads: list[Tensor] = []
            for relu in (F.relu, F.relu_):
                y = relu(layer(z))
                assert y.is_contiguous(memory_format=memory_format)
                grads += torch.autograd.grad(y.pow(2).sum(), z)
            assert torch.equal(*grads)
