"""Launches of Triton kernels, straight to the compiled one once it is known.

``kernel[grid](...)`` finds out at every call which compiled kernel its arguments ask for. All calls
of a `Launch` ask for the same: it keeps what the first one has compiled, and from then on calls
what ``kernel[grid]`` ends in. Where Triton has another inside, it goes on with ``kernel[grid]``.
"""

from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

# In these versions a launch ends in ``compiled.run(*grid, stream, function, metadata, None, None,
# None, *arguments)``, constants among the arguments, and an address may stand for a tensor.
_KNOWN = ("3.5.", "3.6.", "3.7.")
_ALIGNMENT = 16  # bytes; for other addresses Triton compiles another kernel


class Launch:
    """One kernel for arguments of one kind, which differ only in memory, and in floats.

    Args:
        kernel: its parameters are tensors, floats, then `numbers` and `constants`.
        programs: of the grid.
        vectors: how many of the tensors, the first ones, it accesses 16 bytes at a time; the others
            are not specialised, or always aligned.
        numbers: by name, integers.
        constants: by name, known to the compiler.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        vectors: int,
        numbers: dict[str, int],
        constants: dict[str, int | bool],
    ) -> None:
        self._kernel, self._grid, self._vectors = kernel, (programs, 1, 1), vectors
        self._named = numbers | constants
        self._last = tuple(self._named[name] for name in kernel.arg_names if name in self._named)
        self._run: Any = None
        self._first: tuple[Any, ...] = ()

    def __call__(
        self, stream: int, *tensors: Tensor | None, floats: tuple[float, ...] = ()
    ) -> None:
        """Launch on the current stream of the current device, which is given by its number."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = True
        for address in addresses[: self._vectors]:
            if address is not None and address % _ALIGNMENT:
                aligned = False
        if aligned and self._run is not None:
            self._run(*self._grid, stream, *self._first, *addresses, *floats, *self._last)
            return
        compiled = self._kernel[self._grid](*tensors, *floats, **self._named)
        if aligned and is_known(compiled):
            self._first = compiled.function, compiled.packed_metadata, None, None, None
            self._run = compiled.run


def is_known(compiled: Any) -> bool:
    """Return whether a `Launch` can call a compiled kernel; the interpreter has none."""
    metadata = getattr(compiled, "metadata", None)
    return metadata is not None and metadata.target.backend == "cuda" and _is_version_known()


@cache
def _is_version_known() -> bool:
    return version("triton").startswith(_KNOWN)


def current_device() -> int:
    """Return the number of the current CUDA device."""
    number: int = torch._C._cuda_getDevice()
    return number


def current_stream(device: int) -> int:
    """Return the number of the current stream of a CUDA device."""
    number: int = torch._C._cuda_getCurrentRawStream(device)
    return number
