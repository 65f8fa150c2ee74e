"""Replacing layers of a model in place of others that share everything with them."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DEEP = 8  # layers in mode swap from which the growth of the activations is worth a warning


Layer = TypeVar("Layer", bound=nn.Module)


def convert(
    module: nn.Module,
    layer_type: type[Layer],
    configure: Callable[[Layer], None],
    mode: str,
) -> nn.Module:
    """Replace all batch norms in `module` by `layer_type`, each passed to `configure`."""
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, _BatchNorm)]
    for name, layer in found:
        if type(layer) not in (*_CONVERTIBLE, layer_type):
            raise TypeError(_refusal(name, layer))
    if mode == "swap" and len(found) >= _DEEP:
        warnings.warn(
            f"convert_shuffle_batchnorm: {len(found)} layers in mode 'swap': activations can "
            "double with every layer, because the statistics that normalise a sample do not "
            'include it, and the loss goes to NaN in deep models; mode="regroup" shuffles '
            "without that",
            stacklevel=3,
        )

    def replacement(layer: nn.Module) -> nn.Module:
        new = _twin(layer, layer_type)
        if not isinstance(layer, layer_type):
            former_group = getattr(layer, "process_group", None)
            new.__dict__["_former"] = (type(layer), former_group)
        configure(new)
        return new

    return _replace(module, (layer for _, layer in found), replacement)


def revert(
    module: nn.Module, layer_type: type[nn.Module], own_attributes: tuple[str, ...]
) -> nn.Module:
    """Replace all converted layers in `module` by layers of their former classes."""
    found = [m for m in module.modules() if isinstance(m, layer_type) and "_former" in m.__dict__]

    def replacement(layer: nn.Module) -> nn.Module:
        former, former_group = layer.__dict__["_former"]
        new: nn.Module = _twin(layer, former)
        for name in ("_former", *own_attributes):
            new.__dict__.pop(name, None)
        if former is nn.SyncBatchNorm:
            new.__dict__["process_group"] = former_group
        return new

    return _replace(module, found, replacement)


def _twin(layer: nn.Module, layer_type: type[Layer]) -> Layer:
    """Return a module of another class with the same parameters, buffers, hooks and attributes."""
    twin = layer_type.__new__(layer_type)
    twin.__dict__.update(layer.__dict__)
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


def _refusal(name: str, layer: nn.Module) -> str:
    kind = type(layer)
    where = f"module {name!r}" if name else "the module"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        cure = "run one forward pass first, so that it knows its channels"
    else:
        cure = "a subclass may do more than batch normalisation; replace it by hand"
    return (
        f"convert_shuffle_batchnorm: {where} is a {kind.__module__}.{kind.__qualname__}, not one "
        f"of {', '.join(c.__name__ for c in _CONVERTIBLE)}: {cure}"
    )
