"""Stability: how large activations grow with depth against the same network in mode `local`."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shuffle_batchnorm.comm import agreement, failures
from shuffle_batchnorm.comm.world import ProcessGroupLike, World, check_process_group, resolve
from shuffle_batchnorm.norm.mixing import Options
from shuffle_batchnorm.norm.modules import ShuffleBatchNorm
from shuffle_batchnorm.shuffle.state import set_shuffle_state

from .checks import total
from .isolation import all_modules, eager, isolated, seed_all, shuffle_worlds

CALL = "stability"


@dataclass(frozen=True)
class StabilityReport:
    """What `stability` found, the same on all ranks; one number per layer, in calling order.

    Attributes:
        layers: the names of the ShuffleBatchNorm layers.
        ratio: `scale` over `local_scale`; 1 where both are 0.
        scale: root mean square of the layer's output over all samples of all ranks.
        local_scale: the same with every layer in mode `local`.
        spectral_radius: the largest of all layers; at most 1 is stable at any depth.
    """

    layers: tuple[str, ...]
    ratio: tuple[float, ...]
    scale: tuple[float, ...]
    local_scale: tuple[float, ...]
    spectral_radius: float

    def __str__(self) -> str:
        """Return the report in one line."""
        return (
            f"spectral radius {self.spectral_radius:.2f}; scale against local over "
            f"{len(self.layers)} layers: {self.ratio[0]:.3g} in the first, {self.ratio[-1]:.3g} "
            f"in the last, {max(self.ratio):.3g} at most"
        )


def stability(
    model: Any, inputs: Any, *, process_group: ProcessGroupLike = None
) -> StabilityReport:
    r"""Compare the activations of a model's batch norm layers with those in mode `local`.

    .. math:: \text{ratio}_l = \frac{\text{rms}(y_l)}{\text{rms}(y_l^{\text{local}})}

    y is the output of layer l. The model runs twice in training mode: as it is, and with every
    ShuffleBatchNorm in mode ``local`` with the same groups. Random numbers and sample shuffles are
    the same in both. Afterwards modes, buffers, training flags and random states are what they
    were.

    Communication: what the model does, called by all ranks; 2 KiB from every rank to every rank,
    and two sums of ``2 * layers`` numbers over all ranks.

    Args:
        model: has ShuffleBatchNorm layers; may be wrapped in a ShuffledEncoder or
            DistributedDataParallel.
        inputs: a batch ``[N, *]``, or a tuple of the model's arguments.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Returns:
        A `StabilityReport`. Layers that the model does not call are not in it.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no ShuffleBatchNorm, or calls none; ranks that disagree on its layers.
        RuntimeError: on the peers of a rank whose model fails.

    Example:
        >>> from shuffle_batchnorm import ShuffleBatchNorm, stability
        >>> layers = [nn.Linear(4, 4), ShuffleBatchNorm(4, mode="swap", groups=2)] * 2
        >>> stability(nn.Sequential(*layers), torch.randn(16, 4)).spectral_radius
        2.0
    """
    check_process_group(CALL, process_group)
    world = resolve(process_group, CALL)
    error: Exception | None = None
    found: dict[str, nn.Module] = {}
    kind = type(model).__name__
    if isinstance(model, nn.Module):
        found = all_modules([model])
    else:
        error = TypeError(f"{CALL}: model must be a module, got {kind}")
    layers = {n: m for n, m in found.items() if isinstance(m, ShuffleBatchNorm)}
    if not layers and error is None:
        error = ValueError(
            f"{CALL}: {kind} has no ShuffleBatchNorm layer; convert it with "
            "ShuffleBatchNorm.convert_shuffle_batchnorm"
        )
    agreement.agree(CALL, {"the number of layers": len(layers)}, error, world)

    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    worlds = shuffle_worlds(found.values(), world)
    runs = []
    with torch.no_grad(), isolated(found.values(), worlds), eager():
        model.train()
        for mode in (None, "local"):
            if mode is not None:
                for layer in layers.values():
                    layer.mode, layer.training = mode, True  # one may stay in eval mode
            seed_all(0)
            set_shuffle_state((0, 0), world.group)
            calls: dict[str, _Calls] = {}
            try:
                with _recording(layers, calls):
                    model(*arguments)
            except Exception as failure:
                failures.announce(world, f"{CALL}: {failure}")
                raise
            runs.append((calls, _scales(list(layers), calls, world)))
    (calls, scales), (_, local_scales) = runs
    error = None
    if not calls:
        error = ValueError(f"{CALL}: {kind} calls none of its ShuffleBatchNorm layers")
    agreement.agree(CALL, {}, error, world)
    scale = tuple(scales[name] for name in calls)
    local_scale = tuple(local_scales[name] for name in calls)
    ratio = tuple(map(_ratio, scale, local_scale))
    radius = max(call.radius for call in calls.values())
    return StabilityReport(tuple(calls), ratio, scale, local_scale, radius)


@dataclass
class _Calls:
    """What a layer did in one run, on this rank."""

    squares: float = 0.0
    numbers: int = 0
    radius: float = 0.0


@contextmanager
def _recording(layers: Mapping[str, ShuffleBatchNorm], calls: dict[str, _Calls]) -> Iterator[None]:
    """Add up what layers put out inside a ``with`` block."""

    def listen(name: str) -> Callable[[ShuffleBatchNorm, Any, Tensor], None]:
        def hook(layer: ShuffleBatchNorm, _: Any, output: Tensor) -> None:
            seen = calls.setdefault(name, _Calls())
            seen.squares += float(output.double().square().sum())
            seen.numbers += output.numel()
            options = Options(layer.mode, layer.groups, layer.offset, layer.blocks)
            ranks = resolve(layer.process_group, CALL).size
            seen.radius = max(seen.radius, _radius(options, ranks, len(output) // layer.groups))

        return hook

    handles = [layer.register_forward_hook(listen(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scales(names: list[str], calls: Mapping[str, _Calls], world: World) -> dict[str, float]:
    """Return the root mean square of every layer's outputs on all ranks."""
    seen = [calls.get(name, _Calls()) for name in names]
    sums = [[call.squares for call in seen], [float(call.numbers) for call in seen]]
    squares, numbers = total(
        torch.tensor(sums, dtype=torch.float64, device="cpu"), world, CALL
    ).tolist()
    return {
        name: math.sqrt(square / number) if number else 0.0
        for name, square, number in zip(names, squares, numbers, strict=True)
    }


def _ratio(scale: float, local_scale: float) -> float:
    if local_scale:
        return scale / local_scale
    return 1.0 if scale == 0 else math.inf


def _radius(options: Options, world_size: int, samples: int) -> float:
    """Return ``spectral_radius(mixing_matrix(...))`` for a group of this many samples.

    In closed form, because the matrix has a row for each sample of all ranks. A partition into sets
    of more than one sample leaves differences within a set as they are, and removes its mean. A
    rotation in cycles of n groups has ``2 sin(pi k / n)`` between groups.
    """
    groups = world_size * options.groups
    if options.mode == "swap" and options.offset % groups:
        cycle = groups // math.gcd(groups, options.offset)
        return 2 * math.sin(math.pi * (cycle // 2) / cycle)
    together = groups * samples if options.mode == "sync" else samples
    return 1.0 if together > 1 else 0.0
