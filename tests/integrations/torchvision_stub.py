"""A stand-in for torchvision, for tests of what imports it and needs little of it.

timm and lightly import it for transforms and data sets, which no test here touches: any name asked
of the stub is an empty module class. Where torchvision is installed, that is used.
"""

import enum
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import nn

_MODULES = (
    "torchvision", "torchvision.datasets", "torchvision.ops", "torchvision.ops.misc",
    "torchvision.transforms", "torchvision.transforms.functional",
)  # fmt: skip


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)
        setattr(self, name, type(name, (nn.Module,), {}))
        found: type = self.__dict__[name]
        return found


class _Interpolation(enum.Enum):
    """The one name that is looked into when timm is imported."""

    NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(7)


@contextmanager
def torchvision_for_import() -> Iterator[None]:
    """Let ``import timm`` and ``import lightly`` find a torchvision, and nothing later see it."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    stubs = {name: _Stub(name) for name in _MODULES}
    for name, stub in stubs.items():
        package, _, stem = name.rpartition(".")
        if package:
            setattr(stubs[package], stem, stub)
    stubs["torchvision.transforms.functional"].__dict__["InterpolationMode"] = _Interpolation
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]
