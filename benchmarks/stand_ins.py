"""Stand-ins for the Triton kernels, in which nothing runs: what remains of a layer is host time."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from shuffle_batchnorm.kernels import launch, select, triton_kernels, triton_launch, triton_merge

HEAVY: dict[ModuleType, tuple[str, ...]] = {
    triton_kernels: ("moments", "affine", "grad_sums", "grad_affine"),
    triton_merge: ("finish_moments", "finish_sums"),
}


class _StandIn:
    """A kernel that is counted when it is launched, and does nothing."""

    def __init__(self, kernel: Any, name: str, launches: Counter[str]) -> None:
        self.arg_names = kernel.arg_names
        self._name, self._launches = name, launches

    def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., Any]:
        return self._compile

    def _compile(self, *_tensors: Any, **_named: Any) -> Any:
        self._run()
        metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda"))
        return SimpleNamespace(metadata=metadata, function=0, packed_metadata=(), run=self._run)

    def _run(self, *_arguments: Any) -> None:
        self._launches[self._name] += 1


@contextmanager
def triton_stand_ins() -> Iterator[Counter[str]]:
    """Let layers on the CPU launch stand-ins of the Triton kernels; yields what was launched."""
    launches: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(patch.object(select, "select", lambda _: triton_launch))
        stack.enter_context(patch.object(launch, "_is_version_known", lambda: True))
        for module, names in HEAVY.items():
            for name in names:
                stand_in = _StandIn(getattr(module, name), name, launches)
                stack.enter_context(patch.object(module, name, stand_in))
        yield launches
