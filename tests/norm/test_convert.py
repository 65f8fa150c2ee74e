"""Converting a model and reverting it: what is shared, what is kept, what is refused."""

import copy
import pickle
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm

convert = ShuffleBatchNorm.convert_shuffle_batchnorm
revert = ShuffleBatchNorm.revert_shuffle_batchnorm
KINDS = pytest.mark.parametrize(
    ("kind", "space"),
    [
        (nn.BatchNorm1d, ()),
        (nn.BatchNorm1d, (5,)),
        (nn.BatchNorm2d, (3, 4)),
        (nn.BatchNorm3d, (2, 3, 2)),
        (nn.SyncBatchNorm, (3, 4)),
    ],
)


class BatchNormWithActivation(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def _nested() -> nn.Module:
    """Batch norms in every kind of container, between others that must stay."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ModuleDict({"a": nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4)])}),
        nn.Sequential(nn.Sequential(nn.SyncBatchNorm(5), nn.GroupNorm(1, 4)), nn.BatchNorm3d(2)),
    )


def _kinds(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(m)) for name, m in model.named_modules()]


@KINDS
@pytest.mark.parametrize("inside", [False, True])
def test_a_layer_there_and_back(
    kind: type[_BatchNorm], space: tuple[int, ...], inside: bool
) -> None:
    """Catches another output, tensors that are copies, options lost, on the way or back."""
    layer = kind(6, eps=0.1, momentum=None).double()
    nn.init.normal_(layer.weight)
    layer(torch.randn(8, 6, *space).double()) if kind is not nn.SyncBatchNorm else None
    tensors = {k: id(t) for k, t in layer.state_dict(keep_vars=True).items()}
    x, model = torch.randn(8, 6, *space).double(), nn.Sequential(layer) if inside else layer
    want = model.eval()(x)
    converted = convert(model, mode="regroup", groups=2, offset=3, blocks=4)
    new = converted[0] if isinstance(converted, nn.Sequential) else converted
    assert type(new) is ShuffleBatchNorm
    assert (new.eps, new.momentum) == (0.1, None)
    assert (new.mode, new.groups, new.offset, new.blocks) == ("regroup", 2, 3, 4)
    assert {k: id(t) for k, t in new.state_dict(keep_vars=True).items()} == tensors
    assert torch.equal(converted(x), want)
    assert converted.train()(x).shape == x.shape
    reverted = revert(converted)
    old = reverted[0] if isinstance(reverted, nn.Sequential) else reverted
    assert type(old) is kind
    assert {k: id(t) for k, t in old.state_dict(keep_vars=True).items()} == tensors
    assert vars(old).keys() == vars(layer).keys()


def test_an_optimizer_made_before_stays_valid() -> None:
    """Catches cloned weights: the optimizer would train parameters that no layer uses."""
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    convert(model, mode="swap", groups=2)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        # The bias before a batch norm has no gradient but rounding.
        assert name == "0.bias" or not torch.equal(p, parameters[name]), name


def test_reconfiguring_a_converted_model() -> None:
    """Catches a second conversion that keeps the first one's options or loses the class before."""
    model = convert(nn.Sequential(nn.BatchNorm1d(6), ShuffleBatchNorm(6)), mode="sync", groups=2)
    convert(model, mode="regroup", groups=4)
    for layer in model.children():
        assert isinstance(layer, ShuffleBatchNorm)
        assert (layer.mode, layer.groups, layer.offset) == ("regroup", 4, 1)
    # What was constructed as a ShuffleBatchNorm has no class before.
    assert [kind for _, kind in _kinds(revert(model))[1:]] == [nn.BatchNorm1d, ShuffleBatchNorm]


def test_training_and_requires_grad_are_kept_per_layer() -> None:
    """Catches frozen layers that thaw: their peers would wait for statistics (mmengine#1624)."""
    model = nn.Sequential(*(nn.BatchNorm1d(6) for _ in range(3)))
    model[0].eval().requires_grad_(False)
    model[1].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    for change in (convert, revert):
        change(model)
        assert [m.training for m in model.children()] == [False, True, True]
        assert [p.requires_grad for p in model.parameters()] == flags


def test_hooks_stay_and_their_handles_work() -> None:
    """Catches hooks that are dropped, called twice, or that no handle removes any more."""
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda *_args, **_kwargs: calls.append(name)

    layer = nn.BatchNorm1d(6)
    handles = [
        layer.register_forward_pre_hook(note("pre"), with_kwargs=True),
        layer.register_forward_hook(note("forward"), always_call=True),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_post_hook(note("state_dict")),
        layer.register_load_state_dict_pre_hook(note("load")),
        layer.register_load_state_dict_post_hook(note("loaded")),
    ]
    names = ["pre", "forward", "backward", "state_dict", "load", "loaded"]
    model = nn.Sequential(layer)
    del layer
    for change in (partial(convert, groups=2), revert, partial(convert, groups=2)):
        change(model)
        calls.clear()
        model(torch.randn(4, 6, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls == names
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(4, 6, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == []


def test_custom_attributes_are_kept() -> None:
    """Catches what users and quantisers hang on a layer getting lost, and ours staying behind."""
    layer = nn.BatchNorm1d(6)
    layer.__dict__.update(qconfig="a config", note=["mine"])
    layer.register_buffer("extra", torch.arange(3.0))
    new = convert(layer)
    assert vars(new)["qconfig"] == "a config"
    assert vars(new)["note"] is vars(layer)["note"]
    assert new.get_buffer("extra") is layer.get_buffer("extra")
    assert vars(revert(new)).keys() == vars(layer).keys()


def test_a_layer_used_twice_stays_one_layer() -> None:
    """Catches one shared layer that becomes two, which would then update other buffers."""
    shared = nn.BatchNorm1d(6)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": shared})
    for change, kind in ((convert, ShuffleBatchNorm), (revert, nn.BatchNorm1d)):
        change(model)
        layers = [model["a"].get_submodule("0"), model["b"].get_submodule("0"), model["c"]]
        assert {id(layer) for layer in layers} == {id(layers[0])}
        assert type(layers[0]) is kind


def test_nested_containers_there_and_back() -> None:
    """Catches layers missed inside containers, and neighbours changed."""
    model = _nested()
    before = _kinds(model)
    assert convert(model) is model
    for (name, old), (_, new) in zip(before, _kinds(model), strict=True):
        assert new is (ShuffleBatchNorm if issubclass(old, _BatchNorm) else old), name
    assert revert(model) is model
    assert _kinds(model) == before


@pytest.mark.parametrize(
    ("layer", "cure"),
    [
        (BatchNormWithActivation(6), "a subclass may do more"),
        (nn.LazyBatchNorm2d(), "run one forward pass first"),
    ],
    ids=lambda p: type(p).__name__,
)
def test_other_subclasses_are_refused_by_name(layer: nn.Module, cure: str) -> None:
    """Catches a subclass that is silently flattened, and a model left half converted."""
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ModuleDict({"norm": layer}))
    before = _kinds(model)
    kind = re.escape(f"{type(layer).__module__}.{type(layer).__qualname__}")
    with pytest.raises(TypeError, match=rf"module '1\.norm' is a {kind}, not one of .*: {cure}"):
        convert(model)
    assert _kinds(model) == before
    with pytest.raises(TypeError, match=rf"^convert_shuffle_batchnorm: the module is a {kind}, "):
        convert(layer)


def test_lazy_layers_convert_after_their_first_forward() -> None:
    """Catches a cure in the error's text that does not help."""
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))
    assert type(convert(model)[0]) is ShuffleBatchNorm  # type: ignore[index]


@pytest.mark.parametrize(("mode", "layers"), [("swap", 8), ("swap", 7), ("regroup", 20)])
def test_deep_swap_warns_once(mode: str, layers: int) -> None:
    """Catches silence about activations that grow as 2 to the depth, or a warning per layer."""
    model = nn.Sequential(*(nn.BatchNorm1d(6) for _ in range(layers)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(model, mode=mode)
    if (mode, layers) != ("swap", 8):
        assert not caught
        return
    [warning] = caught
    assert str(warning.message).startswith("convert_shuffle_batchnorm: 8 layers in mode 'swap': ")
    assert 'mode="regroup"' in str(warning.message)
    assert warning.filename == __file__, "points at the caller's line"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(mode="shuffle"),
            ValueError,
            "unknown mode 'shuffle', choose one of local, sync, swap, regroup",
        ),
        (dict(groups=0), ValueError, "groups must be at least 1, got groups=0"),
        (dict(blocks=-1), ValueError, "blocks must be at least 1, got blocks=-1"),
        (dict(groups=2.0), TypeError, "groups must be an int, got 2.0"),
        (dict(offset=True), TypeError, "offset must be an int, got True"),
        (
            dict(process_group="world"),
            TypeError,
            "process_group must be None, a ProcessGroup or a 1-D DeviceMesh, got str",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Catches an option that is only found wrong in training, or an error without its value."""
    model = nn.Sequential(nn.BatchNorm1d(6))
    for call, name in (
        (ShuffleBatchNorm, "ShuffleBatchNorm"),
        (convert, "convert_shuffle_batchnorm"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'{name}: {message}')}$"):
            call(*((model,) if call == convert else (6,)), **options)
    assert type(model[0]) is nn.BatchNorm1d


def test_a_converted_model_pickles_and_reverts_after() -> None:
    """Catches the class before being lost in a checkpoint of the whole model."""
    model = pickle.loads(pickle.dumps(convert(_nested(), mode="regroup")))
    assert _kinds(revert(model)) == _kinds(_nested())


def _groups_of_sync_batch_norm() -> list[bool]:
    group, world = dist.new_group([0, 1]), dist.group.WORLD
    model = nn.Sequential(nn.SyncBatchNorm(6, process_group=group))
    convert(model, world, mode="regroup")
    twin = copy.deepcopy(model)  # as MoCo makes its key encoder
    facts = [twin(torch.randn(4, 6)).shape == (4, 6)]
    facts += [vars(m[0])["process_group"] is world for m in (model, twin)]
    for reverted in (revert(model), revert(twin)):
        layer = reverted.get_submodule("0")
        facts += [type(layer) is nn.SyncBatchNorm, vars(layer)["process_group"] is group]
    return facts


def test_sync_batch_norm_gets_its_process_group_back() -> None:
    """Catches a group lost in between, and a deep copy that tries to copy it."""
    for results in run_on_ranks(2, _groups_of_sync_batch_norm):
        assert all(results), results
