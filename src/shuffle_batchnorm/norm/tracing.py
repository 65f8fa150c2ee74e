"""What a layer is to ``torch.fx``, ``torch.jit``, ``torch.compile`` and ``torch.func``."""

import sys
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .mixing import CALL

# A layer's own ``__module__`` makes it a node of a graph: torch.fx looks there, not at the class,
# and traces into what is not in torch.nn. The class keeps its own, for pickle.
LEAF = "torch.nn (shuffle_batchnorm)"


def _zero(device: torch.device) -> Tensor:
    """Return 0, in compiled code, which an eager checkpoint around it would run twice.

    No Python code is left there that could tell; an operator is what the compiler keeps, one for
    all layers of a graph.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{CALL}: a compiled layer was run inside a backward pass: an activation checkpoint "
            "around compiled code would move its running statistics twice; put the checkpoint "
            "inside the code that is compiled"
        )
    return torch.zeros((), dtype=torch.int64, device=device)


_NAME = "shuffle_batchnorm::zero_outside_backward"
if not hasattr(torch.ops.shuffle_batchnorm, "zero_outside_backward"):  # else loaded again
    torch.library.define(_NAME, "(Device device) -> Tensor")
    torch.library.impl(_NAME, "CompositeExplicitAutograd", _zero)
    torch.library.register_fake(
        _NAME, lambda device: torch.empty((), dtype=torch.int64, device=device)
    )


def count_batch(number: Tensor, step: int = 1) -> None:
    """Add to a layer's number of batches; compiled code raises in a backward pass."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        number.add_(torch.ops.shuffle_batchnorm.zero_outside_backward(number.device) + step)
    elif step:
        number.add_(step)


def check_no_transform(input: Any) -> None:
    """Raise a RuntimeError under transforms that don't know this layer's backward pass."""
    if (
        forward_ad._current_level >= 0
        and isinstance(input, Tensor)
        and forward_ad.unpack_dual(input).tangent is not None
    ):
        refuse_to("forward-mode AD", "in training mode it has one for backward passes only")
    if torch._C._are_functorch_transforms_active():
        refuse_to("torch.func", "in training mode a sample's output depends on other samples")


class ReplacementWarning:
    """Warns if a layer is about to be replaced by SyncBatchNorm, as the layer's ``qconfig``.

    PyTorch's converter and timm's ask each batch norm for this attribute, which quantisation may
    have set, and then take it for one of torch's. Nothing of the old layer is called after that.
    """

    def __get__(self, layer: nn.Module | None, _kind: type) -> NoReturn:
        """Raise an AttributeError, as for any attribute that is not there."""
        if layer is not None and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            warnings.warn(
                "convert_sync_batchnorm replaces ShuffleBatchNorm layers, so that they shuffle "
                "nothing, and drops activations that belong to them; call it before "
                "convert_shuffle_batchnorm, or use mode='sync' in its place",
                stacklevel=2,
            )
        raise AttributeError("qconfig")


def refuse_to(name: str, why: str) -> NoReturn:
    """Raise what a user of one of torch's tools can do instead."""
    raise RuntimeError(
        f"{CALL}: {name} can't take a ShuffleBatchNorm: {why}; call "
        "ShuffleBatchNorm.revert_shuffle_batchnorm(model) first"
    )


def warn(text: str) -> None:
    """Warn, in code that is traced as well."""
    warnings.warn(f"{CALL}: {text}", stacklevel=2)


# As torch.compiler.assume_constant_result does, which would import the compiler: run when traced.
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
