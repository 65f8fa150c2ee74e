"""What prepared calls share: here the device that they launch on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels.triton_prepared import on_own_device


class _Work:
    """Says on which device it was asked to launch."""

    def __init__(self, index: int | None, current: list[int]) -> None:
        self.index, self._current = index, current

    @on_own_device
    def launch(self, what: str) -> tuple[str, int]:
        return what, self._current[-1]


def test_launches_are_on_the_device_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel on the current device, which has neither the memory nor the stream."""
    current, switches = [0], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        switches.append(index)
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    assert _Work(1, current).launch("sums") == ("sums", 1)
    assert current == [0]
    assert switches == [1]
    assert _Work(0, current).launch("sums") == ("sums", 0)
    assert _Work(None, current).launch("sums") == ("sums", 0)  # on the CPU
    assert switches == [1]  # else nothing is switched, which takes time
