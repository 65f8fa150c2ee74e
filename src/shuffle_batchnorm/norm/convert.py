"""Replacing layers of a model in place by others that share everything with them."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

FilterFn = Callable[[nn.Module, str], bool]

_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_STANDARD = ", ".join(kind.__name__ for kind in _CONVERTIBLE)
_DEEP = 8  # layers in mode swap from which the growth of the activations is worth a warning
# What a subclass may define and still normalise as its base does.
_HARMLESS = {"__init__", "__annotate_func__", "extra_repr", "reset_parameters"}
_CONVERT, _REVERT = "convert_shuffle_batchnorm", "revert_shuffle_batchnorm"


Layer = TypeVar("Layer", bound=nn.Module)


def convert(
    module: nn.Module,
    layer_type: type[Layer],
    base: type[nn.Module],
    configure: Callable[[Any], None],
    mode: str,
    filter_fn: FilterFn | None,
) -> nn.Module:
    """Replace all batch norms in `module` by `layer_type`; layers of type `base` stay.

    Each is passed to `configure`.
    """
    found = _select(_CONVERT, module, _BatchNorm, filter_fn)
    existing = {layer: name for layer, name in found.items() if isinstance(layer, base)}
    others = {layer: name for layer, name in found.items() if layer not in existing}
    for layer, name in others.items():
        if cure := _obstacle(layer) or _doubt(layer):
            raise TypeError(_refusal(_CONVERT, name, layer, cure))
    _check_not_wrapped(_CONVERT, module, others)
    _warn(module, len(found), mode, filter_fn)
    for layer in existing:
        configure(layer)

    def replacement(layer: nn.Module) -> nn.Module:
        new = _twin(layer, layer_type)
        new.__dict__["_former"] = (type(layer), getattr(layer, "process_group", None))
        new.__dict__["_is_followed"] = _has_activation(layer)
        configure(new)
        return new

    return _replace(module, others, replacement)


def revert(
    module: nn.Module,
    layer_type: type[nn.Module],
    own_attributes: tuple[str, ...],
    filter_fn: FilterFn | None,
) -> nn.Module:
    """Replace all converted layers in `module` by layers of their former classes."""
    selected = _select(_REVERT, module, layer_type, filter_fn)
    found = {layer: name for layer, name in selected.items() if "_former" in layer.__dict__}
    for layer, name in found.items():
        if cure := _obstacle(layer):
            raise TypeError(_refusal(_REVERT, name, layer, cure))
    _check_not_wrapped(_REVERT, module, found)

    def replacement(layer: nn.Module) -> nn.Module:
        former, former_group = layer.__dict__["_former"]
        new: nn.Module = _twin(layer, former)
        for name in ("_former", "_is_followed", *own_attributes):
            new.__dict__.pop(name, None)
        if issubclass(former, nn.SyncBatchNorm):
            new.__dict__["process_group"] = former_group
        return new

    return _replace(module, found, replacement)


def _warn(module: nn.Module, number: int, mode: str, filter_fn: FilterFn | None) -> None:
    """Warn if there is nothing to convert, or if it will not learn."""
    if number == 0 and filter_fn is not None:
        text = "filter_fn takes none of the model's batch norm layers, so nothing is converted"
    elif number == 0:
        text = f"the model has no batch norm layer, so nothing is converted{_other_norms(module)}"
    elif mode == "swap" and number >= _DEEP:
        text = (
            f"{number} layers in mode 'swap': activations can double with every layer, because "
            "the statistics that normalise a sample do not include it, and the loss goes to NaN "
            'in deep models; mode="regroup" shuffles without that'
        )
    else:
        return
    warnings.warn(f"{_CONVERT}: {text}", stacklevel=4)


def _other_norms(module: nn.Module) -> str:
    """Return what the model has in place of batch norms, for a warning."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        return "; scripted and traced modules can't be converted: convert first"
    names = {type(m).__name__ for m in module.modules()}
    norms = sorted(name for name in names if "norm" in name.lower())
    return f"; its normalisation layers are {', '.join(norms)}" if norms else ""


def _select(
    call: str, module: nn.Module, kind: type[nn.Module], filter_fn: FilterFn | None
) -> dict[nn.Module, str]:
    """Return the layers of a kind, each with the first of its names that the filter takes."""
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"{call}: filter_fn must be None or a function (module, qualified_name) -> bool, "
            f"got {filter_fn!r}"
        )
    found: dict[nn.Module, str] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, kind) and (filter_fn is None or filter_fn(layer, name)):
            found.setdefault(layer, name)
    return found


def _twin(layer: nn.Module, layer_type: type[Layer]) -> Layer:
    """Return a module of another class with the same parameters, buffers, hooks and attributes."""
    twin = layer_type.__new__(layer_type)
    twin.__dict__.update(layer.__dict__)
    twin.__dict__.pop("_compiled_call_impl", None)  # by Module.compile: it calls the old layer
    for name in ("_parameters", "_buffers", "_modules"):
        # Tables of their own, so that a tensor set on one layer is not set on the other. The hook
        # tables stay shared: a handle made before can still remove its hook.
        twin.__dict__[name] = layer.__dict__[name].copy()
    for hook in twin.__dict__["_load_state_dict_pre_hooks"].values():
        if hook.with_module:  # through a weak reference, dead as soon as the old layer is
            hook.module = weakref.ref(twin)
    return twin


def _replace(
    module: nn.Module,
    layers: Iterable[nn.Module],
    replacement: Callable[[nn.Module], nn.Module],
) -> nn.Module:
    """Put replacements where the layers are, the same one wherever a layer is used twice."""
    new: dict[nn.Module, nn.Module] = {layer: replacement(layer) for layer in layers}
    for parent in list(module.modules()):
        children: dict[str, Any] = parent._modules
        for name, child in children.items():
            if child in new:
                children[name] = new[child]
    replaced: nn.Module = new.get(module, module)
    return replaced


def _obstacle(layer: nn.Module) -> str:
    """Return what has to be done before this layer can be replaced; empty if nothing has."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "run one forward pass first, so that it knows its channels"
    if parametrize.is_parametrized(layer):
        return (
            "remove the parametrization first "
            "(torch.nn.utils.parametrize.remove_parametrizations), and register it again after"
        )
    if "forward" in layer.__dict__:
        return "its forward was set on the object, as Accelerate's hooks do; remove that first"
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    sharded = any(_is_a("DTensor", t) or hasattr(t, "_fsdp_flattened") for t in tensors)
    # Flattened by FSDP1, it is a plain attribute, and no hook makes it from another parameter.
    lost = "weight" in layer.__dict__ and not any(n.startswith("weight") for n in layer._parameters)
    if sharded or lost or _is_a("FSDPModule", layer):
        return _WRAPPED
    return ""


_WRAPPED = (
    "convert before fully_shard, FullyShardedDataParallel or distribute_module, and revert before "
    "them as well"
)


def _check_not_wrapped(call: str, module: nn.Module, layers: dict[nn.Module, str]) -> None:
    """Raise a TypeError if FSDP1 has taken the parameters out of one of the layers."""
    for wrapper in module.modules():
        if _is_a("FullyShardedDataParallel", wrapper):
            for layer in wrapper.modules():
                if layer in layers:
                    raise TypeError(_refusal(call, layers[layer], layer, _WRAPPED))


def _is_a(name: str, thing: object) -> bool:
    """Whether a class of this name is among a thing's classes; saves the import of torch's."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def _doubt(layer: nn.Module) -> str:
    """Return why a layer might do more than batch normalisation; empty if it does not."""
    own = _own_behaviour(layer) - _HARMLESS
    if own == {"forward"} and _has_activation(layer):
        return "" if _activates_last(layer) else "its forward is not drop and act after batch norm"
    if not own:
        return ""
    return (
        f"a subclass may do more than batch normalisation, here in its {', '.join(sorted(own))}; "
        "replace it by hand, or leave it out with filter_fn"
    )


def _own_behaviour(layer: nn.Module) -> set[str]:
    """Return the names of what a layer's classes, but those of torch, define to be called."""
    kinds = (FunctionType, property, classmethod, staticmethod)
    return {
        name
        for kind in type(layer).__mro__
        if kind not in (*nn.BatchNorm1d.__mro__, *_CONVERTIBLE, Generic)
        for name, value in vars(kind).items()
        if isinstance(value, kinds)
    }


def _has_activation(layer: nn.Module) -> bool:
    """Whether this is a batch norm followed by its `drop` and `act`, as timm's BatchNormAct2d."""
    return layer._modules.keys() == {"drop", "act"} and "forward" in _own_behaviour(layer)


def _activates_last(layer: nn.Module) -> bool:
    """Whether a layer's forward gives in eval mode what `drop` and `act` after batch norm give."""
    tensor = next(layer.parameters(), next(layer.buffers(), torch.empty(0, device="cpu")))
    if tensor.is_meta:
        return True
    # Called without hooks, and with numbers that show an order.
    twin: Any = _twin(layer, type(layer))
    twin.training = False
    for name, child in layer._modules.items():
        twin._modules[name] = copy.deepcopy(child).eval()  # type: ignore[union-attr]
    count = twin.num_features
    channels = torch.linspace(-2, 2, count, device="cpu").to(tensor)
    mean, var, weight, bias = channels, channels.exp(), channels + 0.3, channels.cos()
    twin._buffers.update(running_mean=mean, running_var=var)
    twin._parameters.update(weight=weight, bias=bias)
    space = {nn.BatchNorm1d: (3,), nn.BatchNorm3d: (3, 1, 1)}
    ends = next((space[kind] for kind in space if isinstance(layer, kind)), (3, 1))
    x = torch.linspace(-4, 4, 6 * count, device="cpu").to(tensor).view(2, count, *ends)
    with torch.no_grad():
        norm = nn.functional.batch_norm(x, mean, var, weight, bias, eps=twin.eps)
        want = twin.act(twin.drop(norm))
        return torch.allclose(type(layer).forward(twin, x), want, rtol=0.02, atol=0.02)


def _refusal(call: str, name: str, layer: nn.Module, cure: str) -> str:
    kind = type(layer)
    where = f"module {name!r}" if name else "the module"
    standard = "" if kind in _CONVERTIBLE or call == _REVERT else f", not one of {_STANDARD}"
    return f"{call}: {where} is a {kind.__module__}.{kind.__qualname__}{standard}: {cure}"
