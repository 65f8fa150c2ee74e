"""Launches of Triton kernels, straight to the compiled one once it is known.

``kernel[grid](...)`` finds out at every call which compiled kernel its arguments ask for. All calls
of a `Launch` ask for the same: it keeps what the first one has compiled, and from then on calls
what ``kernel[grid]`` ends in. Where Triton has another inside, it goes on with ``kernel[grid]``.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# In these versions a launch ends in ``compiled.run(*grid, stream, function, metadata, None, None,
# None, *arguments)``, constants among the arguments.
_KNOWN = ("3.5.", "3.6.", "3.7.")
ALIGNMENT = 16  # bytes; for memory at other addresses Triton compiles another kernel


class Launch:
    """One kernel for arguments of one kind, which differ only in memory, and in floats.

    Args:
        kernel: its parameters are tensors, floats, then `numbers` and `constants`.
        programs: of the grid.
        numbers: by name, integers.
        constants: by name, known to the compiler.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: dict[str, int], constants: dict[str, int | bool]
    ) -> None:
        self._kernel, self._programs = kernel, programs
        self._named = numbers | constants
        self._last = tuple(self._named[name] for name in kernel.arg_names if name in self._named)
        self._run: Any = None
        self._function: Any = None
        self._metadata: Any = None

    def __call__(self, aligned: bool, stream: int, *arguments: Tensor | float | None) -> None:
        """Launch on the current stream of the current device.

        Args:
            aligned: whether all memory at whose address Triton looks is aligned.
            stream: its number.
            *arguments: tensors, and None in place of some, then floats.
        """
        if aligned and self._run is not None:
            self._run(
                self._programs, 1, 1, stream, self._function, self._metadata, None, None, None,
                *arguments, *self._last,
            )  # fmt: skip
            return
        compiled = self._kernel[(self._programs,)](*arguments, **self._named)
        if aligned and is_known(compiled):
            self._function, self._metadata = compiled.function, compiled.packed_metadata
            self._run = compiled.run


def is_known(compiled: Any) -> bool:
    """Return whether a `Launch` can call a compiled kernel; the interpreter has none."""
    metadata = getattr(compiled, "metadata", None)
    return metadata is not None and metadata.target.backend == "cuda" and _is_version_known()


@cache
def _is_version_known() -> bool:
    known: bool = import_module("triton").__version__.startswith(_KNOWN)
    return known


def current_stream(device: int) -> int:
    """Return the number of the current stream of a CUDA device."""
    number: int = torch._C._cuda_getCurrentRawStream(device)
    return number


def current_device() -> int:
    """Return the number of the current CUDA device."""
    number: int = torch._C._cuda_getDevice()
    return number
