"""What the probes ask of arguments and features; and the sum of all ranks' numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import World, default_device


def length(call: str, images: Any) -> int:
    """Return the number of images in a pool."""
    if isinstance(images, Tensor) and images.ndim == 0:
        raise ValueError(f"{call}: images must have a leading dimension, got a scalar")
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise TypeError(
            f"{call}: images must be a tensor [M, *] or a data set with a length, "
            f"got {type(images).__name__}"
        )
    return len(images)


def describe(images: Any) -> str:
    """Return what tells one pool from another: for a tensor a sum of its bytes, by position."""
    if not isinstance(images, Tensor):
        return f"{type(images).__name__} of {len(images)}"
    rows = images.detach().reshape(len(images), -1).contiguous().view(torch.uint8)
    position = torch.arange(1, len(rows) + 1, device=rows.device)
    total = int((rows.sum(dim=1, dtype=torch.int64) * position).sum())
    return f"{list(images.shape)} {images.dtype}, sum {total}"


def check_queue(call: str, queue: Any, keys: int) -> None:
    """Raise what makes a queue, or the lack of one, unacceptable."""
    if queue is None:
        if keys < 2:
            raise ValueError(
                f"{call}: without a queue the other keys of the batch are the negatives: "
                f"keys_per_batch must be at least 2, got {keys}"
            )
    elif not isinstance(queue, Tensor) or not queue.is_floating_point():
        kind = queue.dtype if isinstance(queue, Tensor) else type(queue).__name__
        raise TypeError(f"{call}: queue must be a floating-point tensor [K, D], got {kind}")
    elif queue.ndim != 2 or len(queue) == 0:
        raise ValueError(f"{call}: queue must be [K, D], got shape {tuple(queue.shape)}")
    elif not queue.isfinite().all():
        raise ValueError(f"{call}: queue has numbers that are not finite")


def check_interval(call: str, confidence: Any, resamples: Any) -> None:
    """Raise a ValueError if an interval can't be had with these."""
    if not isinstance(confidence, float) or not 0.5 <= confidence < 1:
        raise ValueError(f"{call}: confidence must be from 0.5 to below 1, got {confidence!r}")
    if not isinstance(resamples, int) or resamples < 100:
        raise ValueError(f"{call}: resamples must be an int of at least 100, got {resamples!r}")


def check_mode(call: str, name: str, modules: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError if an encoder's batch norm layers all use their running statistics."""
    layers = {n: m for n, m in modules.items() if isinstance(m, _BatchNorm)}
    evaluating = [n for n, m in layers.items() if not m.training and m.running_mean is not None]
    if layers and len(evaluating) == len(layers):
        raise ValueError(
            f"{call}: {name} has its batch norm layers in eval mode (layer {evaluating[0]!r}), "
            "where no sample depends on the others; call .train() on the encoder"
        )


def features(call: str, name: str, output: Any, samples: int, width: int | None = None) -> Tensor:
    """Return an encoder's features ``[N, D]`` in float64 on the CPU, or raise what is wrong."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"{call}: {name} must return a floating-point tensor [N, D], got {kind}")
    if output.ndim != 2 or len(output) != samples or output.shape[1] != (width or output.shape[1]):
        # Queries come first, so it is the queue that they don't fit.
        hint = "; the queue must be [K, D]: transpose that of facebookresearch/moco"
        raise ValueError(
            f"{call}: {name} must return [{samples}, {width or 'D'}], "
            f"got shape {tuple(output.shape)}{hint if width and name == 'encode_query' else ''}"
        )
    if not output.isfinite().all():
        raise ValueError(f"{call}: {name} returned features that are not finite")
    return output.detach().to("cpu", torch.float64)


def total(row: Tensor, world: World, call: str) -> Tensor:
    """Return the sum of every rank's numbers, in the shape and on the device that they have.

    Communication: one all_reduce.
    """
    if world.size == 1:
        return row
    flat = row.flatten().to(default_device(world))
    summed = collectives.all_sum(flat, world, call, f"adds up its results in {call}")
    return summed.to(row.device).view(row.shape)
