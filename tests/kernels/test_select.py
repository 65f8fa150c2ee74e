"""Which kernels a tensor gets: by device and dtype, and where Triton does not work."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.kernel_cases import all_four, rows_for
from shuffle_batchnorm.kernels import cpu, reference, select
from shuffle_batchnorm.kernels.select import Kernels
from shuffle_batchnorm.norm.mixing import block_sizes

CPU: Kernels = cpu
REFERENCE: Kernels = reference
CUDA = torch.cuda.is_available()


def test_kernels_are_chosen_by_device_and_dtype() -> None:
    """Catches an empty batch sent to aten's loops, and full batches that are not."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert select.select(torch.zeros(2, 3, dtype=dtype)) is CPU
    assert select.select(torch.zeros(0, 3)) is REFERENCE
    assert select.select(torch.zeros(2, 3, device="meta")) is REFERENCE
    with FakeTensorMode():
        assert select.select(torch.zeros(2, 3)) is REFERENCE


def test_no_samples_at_all() -> None:
    """Catches a division by 0 or an error on a rank that got no data (pytorch#36530)."""
    x = torch.empty(0, 3, 4)
    sizes = block_sizes(0, 2, 3)
    results = all_four(select.select(x), x, x, sizes, rows_for(x, sizes, 4))
    for name in ("mean", "std", "total", "dot"):
        assert torch.equal(results[name], torch.zeros(6, 3)), name
    assert results["y"].shape == results["dx"].shape == x.shape


class _OnAGPU:
    """What `select` looks at in a tensor."""

    is_cuda = True
    dtype = torch.float32
    device = torch.device("cuda")

    def numel(self) -> int:
        return 1


@pytest.fixture
def _no_choice_yet() -> Iterator[None]:
    select._triton.cache_clear()
    yield
    select._triton.cache_clear()


@pytest.mark.gpu_too
@pytest.mark.usefixtures("_no_choice_yet")
def test_triton_is_chosen_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Triton for tensors without numbers or of other dtypes, or while compiling."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    x: Any = _OnAGPU()
    monkeypatch.setattr(select, "Tensor", _OnAGPU)
    if not CUDA:  # the interpreter wants memory of the CPU
        monkeypatch.setattr(torch, "ones", lambda *shape, **_: torch.full(shape, 1.0))
    assert select.select(x).__name__.endswith("triton_launch")
    x.dtype = torch.float8_e4m3fn
    assert select.select(x) is REFERENCE
    x.dtype = torch.float32
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert select.select(x) is REFERENCE


@pytest.mark.skipif(CUDA, reason="it is there")
@pytest.mark.usefixtures("_no_choice_yet")
def test_where_triton_does_not_work_a_warning_says_what_is_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a training that ends for want of a C compiler, and one that is slow in silence."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    x: Any = _OnAGPU()
    monkeypatch.setattr(select, "Tensor", _OnAGPU)
    with pytest.warns(UserWarning, match=r"Triton does not work here.* slower: \w+: .+"):
        assert select.select(x) is REFERENCE
    assert select.select(x) is REFERENCE  # once is enough


@pytest.mark.skipif(CUDA, reason="it is there")
@pytest.mark.usefixtures("_no_choice_yet")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("triton_kernels", name) for name in ("moments", "affine", "grad_sums", "grad_affine")),
        *(("triton_merge", name) for name in ("finish_moments", "finish_sums")),
        *(("triton_messages", name) for name in ("pack_moments", "mix_moments")),
        *(("triton_messages", name) for name in ("pack_sums", "mix_sums")),
    ],
)
def test_a_kernel_that_fails_later_fails_at_the_choice(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a training that ends in its first backward pass."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    x: Any = _OnAGPU()
    monkeypatch.setattr(select, "Tensor", _OnAGPU)
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: torch.full(shape, 1.0))
    monkeypatch.setattr(f"shuffle_batchnorm.kernels.{module}.{name}", None)
    with pytest.warns(UserWarning, match="Triton does not work here"):
        assert select.select(x) is REFERENCE


def test_all_kernels_are_called_alike() -> None:
    """Catches an argument that one of the modules has in another place, or has not."""
    triton = pytest.importorskip("shuffle_batchnorm.kernels.triton_launch")
    heavy = ("block_moments", "block_affine", "block_grad_sums", "block_grad_affine")
    rows = ("normaliser_rows", "merge_moments", "param_grads", "dx_coefficients", "backward_rows")
    for name in (*heavy, *rows):
        signature = inspect.signature(getattr(reference, name))
        for module in (cpu, triton):
            assert inspect.signature(getattr(module, name)) == signature, (module, name)
