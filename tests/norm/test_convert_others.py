"""Converting other people's models: subclasses, parts, shards, and those with no batch norm."""

import copy
import re
import time
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize

from ranks import impatient, new_group, run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, shuffle_offset

convert = ShuffleBatchNorm.convert_shuffle_batchnorm
revert = ShuffleBatchNorm.revert_shuffle_batchnorm


class BatchNormAct2d(nn.BatchNorm2d):
    """With timm's structure: normalise, `drop`, `act`."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


class ActThenNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


class InitAlone(nn.BatchNorm2d):
    """As people write to change a default."""

    limit: float = 3.0

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.03)
        self.note = "mine"


class InitOfAnInit(InitAlone):
    pass


class AnyDimensions(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Constants(nn.BatchNorm2d):
    """Classes and numbers as attributes of the class are no behaviour."""

    act_type = nn.ReLU
    limit: float = 3.0


Activation = TypeVar("Activation")


class WithTypes(nn.BatchNorm2d, Generic[Activation]):
    """Parameters of a type are none either."""


class PreAct(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(nn.BatchNorm2d.forward(self, self.act(x)))  # type: ignore[no-any-return]


class Gate(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.BatchNorm2d.forward(self, x)
        return self.drop(y * self.act(y))  # type: ignore[no-any-return]


class Scaled(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Freeze:
    def train(self, mode: bool = True) -> Any: ...


class FrozenByMixin(nn.BatchNorm2d, Freeze):
    pass


class Checking(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)


class Mine(ShuffleBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class FrozenBatchNorm2d(nn.Module):
    pass


class LayerNorm2d(nn.LayerNorm):
    pass


def _texts(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught]


def _kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules()]


@pytest.mark.parametrize("kind", [InitAlone, InitOfAnInit, Constants, WithTypes, BatchNormAct2d])
def test_harmless_subclasses_there_and_back(kind: type[_BatchNorm]) -> None:
    """Catches a subclass that is refused, changed, or not given back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), kind(6))
    reference, x = copy.deepcopy(model), torch.randn(4, 3, 6, 6)
    before = _kinds(model), list(model.state_dict())
    convert(model, mode="local")
    assert type(model[1]) is ShuffleBatchNorm
    assert list(model.state_dict()) == before[1]
    for step in range(2):
        loss, want = model(x + step).square().sum(), reference(x + step).square().sum()
        torch.testing.assert_close(loss, want)
        for wanted in (loss, want):
            wanted.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, rtol=1e-4, atol=1e-4)
    for (name, b), c in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)
    twin = copy.deepcopy(model).eval()
    want = reference.eval()(x)
    torch.testing.assert_close(model.eval()(x), want)
    torch.testing.assert_close(twin(x), want)
    assert _kinds(revert(model)) == before[0]
    torch.testing.assert_close(model(x), want)


def test_an_activation_is_applied_after_the_drop() -> None:
    """Catches `act` before `drop`, or one of the two left out."""
    layer = BatchNormAct2d(6, nn.Hardtanh(0.0, 0.3))
    layer.add_module("drop", nn.Threshold(0.2, 5.0))  # gives 5, which `act` then clips
    y = convert(layer, mode="local")(torch.randn(4, 6, 3, 3))
    assert 0.2 < y.min() < y.max() == torch.tensor(0.3)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ActThenNorm, "forward"),
        (AnyDimensions, "_check_input_dim"),
        (Checking, "_check_input_dim"),
        (FrozenByMixin, "train"),
    ],
)
def test_doubtful_subclasses_are_refused_with_the_reason(kind: type[_BatchNorm], name: str) -> None:
    """Catches an activation before the norm that is taken for one behind it."""
    layer = kind(6)
    text = f"a subclass may do more than batch normalisation, here in its {name}; replace it by h"
    with pytest.raises(TypeError, match=rf"module '0' is a .*, not one of .*: {text}"):
        convert(nn.Sequential(layer))


@pytest.mark.parametrize("kind", [PreAct, Gate, Scaled])
def test_another_order_of_the_same_submodules_is_refused(kind: type[_BatchNorm]) -> None:
    """Catches a structure that is taken for timm's, and computes something else."""
    with pytest.raises(TypeError, match="its forward is not drop and act after batch norm"):
        convert(nn.Sequential(kind(6)))


@pytest.mark.parametrize("options", [dict(device="meta"), dict(dtype=torch.bfloat16)])
def test_an_activation_is_recognised_in_any_dtype(options: dict[str, Any]) -> None:
    """Catches a comparison that only float32 on the CPU allows, or that changes the layer."""
    layer = BatchNormAct2d(6, nn.PReLU()).to(**options)
    layer.drop.train(), layer.act.train()
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    with torch.device("meta"):  # nor does the default device matter
        new = convert(layer)
    assert type(new) is ShuffleBatchNorm
    assert all(m.training for m in new.modules())
    if "dtype" in options:
        assert all(torch.equal(t, state[name]) for name, t in new.state_dict().items())


def test_what_is_bound_to_the_old_layer_is_refused_or_dropped() -> None:
    """Catches a layer that is of the new class and calls the old one."""
    layer = nn.BatchNorm2d(6)
    layer.compile(backend="eager")
    new = convert(layer, mode="regroup", groups=2)
    x = torch.randn(4, 6, 3, 3)
    torch.testing.assert_close(new(x), ShuffleBatchNorm(6, mode="regroup", groups=2)(x))
    hooked = nn.BatchNorm2d(6)
    hooked.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError, match="its forward was set on the object, as Accelerate"):
        convert(nn.Sequential(hooked))


@pytest.mark.parametrize("name", ["act", "drop"])
def test_an_attribute_of_that_name_is_no_activation(name: str) -> None:
    """Catches a plain batch norm on which somebody hangs modules that it never called."""
    layer = InitAlone(6)
    layer.add_module("act", nn.ReLU())
    layer.add_module("drop", nn.Identity())
    setattr(layer, name, nn.Tanh())
    x = torch.randn(4, 6, 2, 2)
    want = copy.deepcopy(layer)(x)
    torch.testing.assert_close(convert(layer, mode="local")(x), want)


def test_subclasses_of_the_layer_are_configured_and_stay() -> None:
    """Catches a user's own subclass that is refused, flattened, or keeps its old options."""
    mine = Mine(6)
    model = nn.Sequential(mine, nn.BatchNorm1d(6), ShuffleBatchNorm(6))
    convert(model, mode="regroup", groups=4)
    assert model[0] is mine
    assert [type(m) for m in model.children()] == [Mine, ShuffleBatchNorm, ShuffleBatchNorm]
    assert all(vars(m)["mode"] == "regroup" and vars(m)["groups"] == 4 for m in model.children())
    assert model(torch.randn(8, 6)).shape == (8, 6)
    Mine.convert_shuffle_batchnorm(model, mode="sync")
    assert [type(m) for m in model.children()] == [Mine, ShuffleBatchNorm, ShuffleBatchNorm]
    assert type(Mine.convert_shuffle_batchnorm(nn.BatchNorm1d(6))) is Mine
    assert [type(m) for m in revert(model).children()] == [Mine, nn.BatchNorm1d, ShuffleBatchNorm]


def _stages() -> nn.Module:
    stage = [nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)) for _ in range(3)]
    return nn.ModuleDict({"stem": nn.LazyBatchNorm1d(), "layer1": stage[0], "layer4": stage[1]})


def _last_stage(_module: nn.Module, name: str) -> bool:
    return name.startswith("layer4")


def test_filter_fn_converts_and_reverts_a_part() -> None:
    """Catches a filter that is asked by another name, or layers left out that change or refuse."""
    asked: list[tuple[type[nn.Module], str]] = []

    def ask(module: nn.Module, name: str) -> bool:
        asked.append((type(module), name))
        return _last_stage(module, name)

    model = convert(_stages(), mode="regroup", groups=2, filter_fn=ask)  # a lazy layer left out
    names = ["stem", "layer1.0", "layer1.2", "layer4.0", "layer4.2"]
    assert [name for _, name in asked] == names
    assert {kind for kind, _ in asked} == {nn.LazyBatchNorm1d, nn.BatchNorm1d}
    converted = [n for n, m in model.named_modules() if isinstance(m, ShuffleBatchNorm)]
    assert converted == ["layer4.0", "layer4.2"]
    # Another part gets other options, and the first one keeps its own.
    convert(model, mode="local", filter_fn=lambda _, name: name == "layer1.0")
    assert model.get_submodule("layer4.0").mode == "regroup"
    assert model.get_submodule("layer1.0").mode == "local"
    revert(model, filter_fn=lambda _, name: name == "layer4.2")
    converted = [n for n, m in model.named_modules() if isinstance(m, ShuffleBatchNorm)]
    assert converted == ["layer1.0", "layer4.0"]


def test_filter_fn_by_module_and_at_the_root() -> None:
    """Catches a filter that is not asked about the module itself, or is given no module."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(4))
    convert(model, groups=2, filter_fn=lambda m, _: isinstance(m, nn.BatchNorm2d))
    assert [type(m) for m in model.children()] == [nn.BatchNorm1d, ShuffleBatchNorm]
    root = convert(nn.BatchNorm1d(4), filter_fn=lambda _, name: name == "")
    assert type(root) is ShuffleBatchNorm


def test_filter_fn_takes_a_shared_layer_by_any_of_its_names() -> None:
    """Catches a layer used twice that only its first name can choose."""
    shared = nn.BatchNorm1d(4)
    model = convert(
        nn.ModuleDict({"a": shared, "b": shared}), groups=2, filter_fn=lambda _, name: name == "b"
    )
    assert [type(model[name]) for name in "ab"] == [ShuffleBatchNorm] * 2  # type: ignore[index]


def test_layers_left_out_do_not_count_for_the_warning() -> None:
    """Catches a warning about depth for a model of which three layers are converted."""
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(20)))
    assert not _texts(lambda: convert(model, mode="swap", filter_fn=lambda _, n: int(n) < 3))
    [text] = _texts(lambda: convert(model, mode="swap", filter_fn=lambda _, n: int(n) < 8))
    assert text.startswith("convert_shuffle_batchnorm: 8 layers in mode 'swap'")


@pytest.mark.parametrize("call", [convert, revert])
@pytest.mark.parametrize("wrong", ["layer4", nn.BatchNorm2d(3).weight, ["layer4"]])
def test_a_filter_that_is_no_function(call: Any, wrong: Any) -> None:
    """Catches a name given as a filter, which would say nothing until it is called."""
    text = "filter_fn must be None or a function (module, qualified_name) -> bool, got"
    with pytest.raises(TypeError, match=f"^{call.__name__}: {re.escape(text)} "):
        call(_stages(), filter_fn=wrong)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), LayerNorm2d(4)), "; its normalisation layers are Layer"),
        (nn.Sequential(FrozenBatchNorm2d()), "; its normalisation layers are FrozenBatchNorm2d"),
        (nn.Linear(3, 4), ""),
        ("traced", "; scripted and traced modules can't be converted: convert first"),
    ],
    ids=["ConvNeXt", "frozen", "none", "traced"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_a_model_without_batch_norm(model: Any, text: str) -> None:
    """Catches silence where nothing was converted."""
    if model == "traced":
        model = torch.jit.trace(nn.BatchNorm1d(4).eval(), torch.randn(2, 4))
    [got] = _texts(lambda: convert(model, mode="regroup"))
    want = "convert_shuffle_batchnorm: the model has no batch norm layer, so nothing is converted"
    assert got.startswith(want + text)


def test_a_filter_that_takes_nothing() -> None:
    """Catches a wrong name in a filter, which converts nothing."""
    [text] = _texts(lambda: convert(_stages(), filter_fn=lambda _, name: name == "layer_4"))
    assert "filter_fn takes none of the model's batch norm layers, so nothing is conv" in text


@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
def test_one_process_and_one_group(mode: str) -> None:
    """Catches silence where a single process has nothing to shuffle; one warning for a model."""
    x = torch.randn(8, 4)
    model = convert(nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(3))), mode=mode)
    texts = _texts(lambda: [model(x), model(x), model(x[:4])])
    if mode in ("local", "sync"):
        assert not texts
        return
    [text] = texts
    assert text == (
        f"shuffle_batch_norm: one rank with groups=1 is a single group, so mode {mode!r} shuffles "
        "nothing; groups=8 cuts each rank's batch into virtual groups, and a process group of "
        "several ranks shuffles among them"
    )
    # New options are looked at again; a copy of the model is another one.
    assert not _texts(lambda: convert(model, mode=mode, groups=2)(x))
    assert len(_texts(lambda: convert(model, mode=mode)(x))) == 1
    assert not _texts(lambda: convert(nn.BatchNorm1d(4), mode=mode, offset=0)(x)), "on purpose"
    layer = convert(nn.BatchNorm1d(4), mode=mode)
    with shuffle_offset(layer, 0):
        assert not _texts(lambda: layer(x))
    assert len(_texts(lambda: layer(x))) == 1, "an unshuffled pass before does not count"
    assert not _texts(lambda: ShuffleBatchNorm(4, mode=mode)(x)), "as the seed's layer"


def _few_groups(groups: int, blocks: int) -> list[str]:
    model = convert(
        nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)),
        mode="regroup", groups=groups, blocks=blocks,
    )  # fmt: skip
    return _texts(lambda: [model(torch.randn(12, 4)) for _ in range(2)])


@pytest.mark.parametrize(("groups", "blocks"), [(1, 8), (2, 8), (3, 8), (1, 3), (4, 8)])
def test_few_groups_across_ranks(groups: int, blocks: int) -> None:
    """Catches silence about a third of the old batch that stays together."""
    total = 3 * groups
    for texts in run_on_ranks(3, _few_groups, groups, blocks):
        if total >= min(8, blocks):
            assert not texts
            continue
        [text] = texts
        assert text == (
            f"shuffle_batch_norm: 3 ranks with groups={groups} are {total} groups, so mode "
            f"'regroup' leaves 1/{total} of the samples that a sample was normalised with "
            "together; groups=3 cuts each rank's batch into virtual groups"
        )


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (nn.BatchNorm2d, (4, 4, 3, 3), [(4, 4), (4, 4, 8), (4, 4, 2, 2, 2)]),
        (nn.BatchNorm1d, (4, 4), [(4, 4, 2, 2), (4, 4, 2, 2, 2)]),
        (nn.BatchNorm1d, (4, 4, 3), [(4,)]),
        (nn.BatchNorm3d, (4, 4, 2, 2, 2), [(4, 4), (4, 4, 3, 3)]),
        (nn.SyncBatchNorm, (4, 4, 3), [(4,)]),
        (BatchNormAct2d, (4, 4, 3, 3), [(4, 4)]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_dimensions_of_the_class_before(
    kind: type[_BatchNorm], good: tuple[int, ...], bad: list[tuple[int, ...]], training: bool
) -> None:
    """Catches input that the model's author had refused; a constructed layer takes any."""
    layer = convert(kind(4), mode="regroup", groups=2).train(training)
    assert layer(torch.randn(good)).shape == good
    for shape in bad:
        with pytest.raises(ValueError, match=r"^shuffle_batch_norm: expected .* \(input shape \("):
            layer(torch.randn(shape))
        if len(shape) > 1:
            ShuffleBatchNorm(4, mode="local", groups=2)(torch.randn(shape))
            name = kind.__name__
            with pytest.raises(ValueError, match=rf"\(got {len(shape)}D input\), as {name}, which"):
                layer(torch.randn(shape))
    assert layer(torch.randn(good)).shape == good


def _other_dimensions() -> tuple[str, str]:
    layer = convert(nn.BatchNorm2d(4), mode="regroup")
    shape = (4, 4, 3, 3) if dist.get_rank() else (4, 4)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        layer(torch.randn(shape))
    return type(caught.value).__name__, str(caught.value)


def test_peers_learn_of_other_dimensions() -> None:
    """Catches a rank that raises alone and leaves its peers waiting."""
    (own, text), (peers, quoted) = run_on_ranks(2, _other_dimensions)
    assert (own, peers) == ("ValueError", "RuntimeError")
    assert text.startswith("shuffle_batch_norm: expected 4D input (got 2D input), as BatchNorm2d")
    assert quoted.startswith(f"shuffle_batch_norm: rank 0 rejected its input: {text[:60]}")


def _parametrized(kind: str) -> nn.Module:
    layer = nn.BatchNorm1d(4)
    if kind == "weight_norm":
        return parametrizations.weight_norm(layer)  # type: ignore[no-any-return]
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


@pytest.mark.parametrize("kind", ["weight_norm", "bias"])
@pytest.mark.parametrize("call", [convert, revert])
def test_parametrized_layers_are_refused(kind: str, call: Any) -> None:
    """Catches a layer whose parameters are lost with its class."""
    model: nn.Module = nn.Sequential(_parametrized(kind))
    if call == revert:
        model = convert(nn.Sequential(nn.BatchNorm1d(4)), groups=2)
        layer = model.get_submodule("0")
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    keys = list(model.state_dict())
    text = f"^{call.__name__}: module '0' is a .*: remove the parametrization first"
    with pytest.raises(TypeError, match=text):
        call(model)
    assert list(model.state_dict()) == keys
    assert model(torch.randn(4, 4)).shape == (4, 4)
    if call == revert:  # options of its own can be set all the same
        assert convert(model, mode="sync")[0].mode == "sync"  # type: ignore[index]


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


def _shard(model: nn.Module, how: str) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "per layer":
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
    if how.startswith("FSDP1"):
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=how.endswith("original"), device_id=torch.device("cpu")
        )
        return wrapped.module if "inside" in how else wrapped
    fully_shard(model, mesh=mesh)
    return model


def _convert_sharded(how: str, call_revert: bool) -> list[str]:
    call = revert if call_revert else convert
    model = convert(_net(), mode="regroup", groups=2) if call_revert else _net()
    model = _shard(model, how)
    x = torch.randn(4, 3, 6, 6)
    before, texts = _kinds(model), []
    for _ in range(2):  # before and after a step, when tensors may have been gathered
        with pytest.raises(TypeError) as caught:
            call(model)
        texts.append(str(caught.value))
        assert _kinds(model) == before
        if "inside" not in how:
            model(x).sum().backward()
    return texts


@pytest.mark.parametrize("call_revert", [False, True])
@pytest.mark.parametrize(
    "how", ["whole", "per layer", "FSDP1 flat", "FSDP1 inside flat", "FSDP1 inside original"]
)
@pytest.mark.filterwarnings("ignore")
def test_converting_a_sharded_model(how: str, call_revert: bool) -> None:
    """Catches a conversion that loses `weight`, or fails in the next step."""
    for texts in run_on_ranks(2, _quiet, _convert_sharded, how, call_revert):
        for text in texts:
            assert (
                "convert before fully_shard, FullyShardedDataParallel or distribute_module, a"
                in text
            )


def _quiet(function: Callable[..., Any], *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1's, about itself
        return function(*args)


def _reconfigure_sharded(how: str) -> list[Any]:
    model = _shard(convert(_net(), mode="swap"), how)
    convert(model, mode="sync", groups=2)
    [layer] = [m for m in model.modules() if isinstance(m, ShuffleBatchNorm)]
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    return [layer.mode, layer.groups, int(layer.num_batches_tracked or 0)]


@pytest.mark.parametrize("how", ["whole", "per layer"])
def test_new_options_on_a_sharded_layer(how: str) -> None:
    """Catches options that only a layer of the original class takes."""
    assert run_on_ranks(2, _reconfigure_sharded, how) == [["sync", 2, 1]] * 2


def _give_a_dtensor() -> list[str]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    layer = ShuffleBatchNorm(4, mode="regroup")
    texts = []
    for placement in (Shard(0), Replicate()):
        x = DTensor.from_local(torch.randn(4, 4), mesh, [placement])
        with pytest.raises((TypeError, RuntimeError)) as caught:
            layer(x)
        texts.append(f"{type(caught.value).__name__}: {caught.value}")
    assert layer(torch.randn(4, 4)).shape == (4, 4)
    return texts


def test_a_dtensor_is_refused_with_the_cure() -> None:
    """Catches an error from inside aten about mixed tensors."""
    want = (
        "TypeError: shuffle_batch_norm: input is a DTensor; pass this rank's part of it, input.to_"
    )
    for texts in run_on_ranks(2, _give_a_dtensor):
        assert [text[: len(want)] for text in texts] == [want] * 2


@pytest.mark.parametrize("eps", [0, -1, 0.0, float("nan"), -1e-9])
def test_eps_has_to_be_positive_in_training(eps: float) -> None:
    """Catches NaN for a constant channel, and 'math domain error'."""
    layer = ShuffleBatchNorm(4, mode="local", groups=2)
    layer(torch.randn(4, 4))
    layer.eps = eps
    text = f"shuffle_batch_norm: eps must be positive when training, got eps={eps}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        layer(torch.randn(4, 4))
    layer.eps = 1e-5
    assert layer(torch.randn(4, 4)).isfinite().all()


def _eps_on_one_rank(steps: int) -> str:
    layer = ShuffleBatchNorm(4, mode="swap")
    for _ in range(steps):
        layer(torch.randn(4, 4))
    layer.eps = 0.0 if dist.get_rank() == 0 else 1e-5
    with pytest.raises((ValueError, RuntimeError)) as caught:
        layer(torch.randn(4, 4))
    return str(caught.value)


def _option_on_one_rank(steps: int) -> tuple[str, float]:
    layer = ShuffleBatchNorm(4, process_group=new_group(), mode="swap")
    with impatient():
        for _ in range(steps):
            layer(torch.randn(4, 4))
        if dist.get_rank() == 0:
            layer.mode = "Sync"
        start = time.monotonic()
        with pytest.raises((ValueError, RuntimeError)) as caught:
            layer(torch.randn(4, 4))
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("steps", [0, 2])
def test_peers_learn_of_a_bad_option(steps: int) -> None:
    """Catches a rank that raises alone, and a peer that waits for the time limit."""
    (own, _), (peers, seconds) = run_on_ranks(2, _option_on_one_rank, steps)
    assert own.startswith("shuffle_batch_norm: unknown mode 'Sync', choose one of")
    assert "rank 0 stopped: shuffle_batch_norm: unknown mode 'Sync'" in peers
    assert seconds < 20


@pytest.mark.parametrize("steps", [0, 2])
def test_peers_learn_of_a_bad_eps(steps: int) -> None:
    """Catches a rank that raises alone, at its first call or later."""
    own, peers = run_on_ranks(2, _eps_on_one_rank, steps)
    assert own == "shuffle_batch_norm: eps must be positive when training, got eps=0.0"
    assert "rejected its input" in peers


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_without_a_bias(affine: bool) -> None:
    """Catches an argument that only some versions of torch have."""
    layer = ShuffleBatchNorm(4, affine=affine, bias=False, mode="local")
    assert list(layer.parameters()) == [layer.weight] * affine
    assert list(layer.state_dict())[:1] == (["weight"] if affine else ["running_mean"])
    x, plain = torch.randn(6, 4), nn.BatchNorm1d(4, affine=affine)
    y = layer(x)
    torch.testing.assert_close(y, plain(x))
    if affine:
        y.square().sum().backward()
        assert layer.weight.grad is not None
        nn.init.zeros_(layer.weight)
        layer.reset_parameters()
        assert layer.weight.eq(1).all()
    assert "bias=False" in repr(layer) or "bias" not in repr(plain)
    assert len(list(copy.deepcopy(layer).parameters())) == affine
    torch.testing.assert_close(layer.eval()(x), layer(x))
