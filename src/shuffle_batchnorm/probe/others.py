"""What the samples around the probes are replaced by."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .patching import Rows


def count_samples(call: str, name: str, tree: Any) -> int:
    """Return N, the length of the first tensor in a tree, or raise what is wrong with it."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise TypeError(
            f"{call}: {name} must be a tensor [N, *], or a tuple, list or dict with one, "
            f"got {type(tree).__name__}"
        )
    return len(tensors[0])


def choose_rows(call: str, count: int, probes: Sequence[int] | Tensor | None) -> Rows:
    """Return which rows are probes: those given, or an eighth of all, evenly spread."""
    if count < 2:
        raise ValueError(f"{call}: inputs must have at least 2 samples, got {count}")
    chosen: list[Any]
    if probes is None:
        number = max(count // 8, 1)
        chosen = [k * count // number for k in range(number)]
    else:
        given: Any = probes.tolist() if isinstance(probes, Tensor) else probes
        chosen = list(given) if isinstance(given, Iterable) else [None]
        if not all(isinstance(k, Integral) and not isinstance(k, bool) for k in chosen):
            raise TypeError(f"{call}: probes must be positions, a list of ints, got {probes!r}")
    if not all(0 <= k < count for k in chosen) or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"{call}: probes must be different positions from 0 to {count - 1}, got {chosen}"
        )
    if not 0 < len(chosen) < count:
        raise ValueError(
            f"{call}: probes must be at least 1 and fewer than the {count} samples, "
            f"got {len(chosen)}"
        )
    return Rows(count, torch.tensor(sorted(chosen), device="cpu"))


def replace_others(call: str, inputs: Any, rows: Rows, pool: Any, seed: int) -> Any:
    """Return the inputs with all rows but the probes' replaced.

    Args:
        call: for messages.
        inputs: what the model takes.
        rows: of it.
        pool: other inputs, drawn from without repetition if they are enough; None for the other
            rows of `inputs`, drawn with repetition: a mere change of places is no change to batch
            norm.
        seed: of the draw.

    Raises:
        TypeError: `pool` has another structure than `inputs`, or numbers of another kind.
        ValueError: it has other shapes, or too few samples; nothing would change.
    """
    mask = torch.ones(rows.count, dtype=torch.bool, device="cpu")
    mask[rows.probes] = False
    others = mask.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        return torch.randint(count, (len(others),), generator=generator, device="cpu")

    if pool is None:
        if len(others) < 2:
            raise ValueError(
                f"{call}: {rows.count} samples with {len(rows.probes)} probes leave 1 other, which "
                "can't be drawn from itself; pass replace=, inputs to draw from"
            )
        source_tree, numbers = inputs, drawn(len(others))
        while len(numbers.unique()) == len(others):  # all of them, in another order at most
            numbers = drawn(len(others))
        numbers = others[numbers]
    else:
        _check_pool(call, inputs, rows, pool)
        source_tree, count = pool, count_samples(call, "replace", pool)
        numbers = drawn(count)
        if count >= len(others):
            order = torch.randperm(count, generator=generator, device="cpu")
            numbers = order[: len(others)]

    def replaced(leaf: Any, source: Any) -> Any:
        if not rows.has(leaf):
            return leaf
        whole = leaf.clone()
        whole[others] = source[numbers].to(leaf)
        return whole

    fresh = pytree.tree_map(replaced, inputs, source_tree)
    pairs = zip(pytree.tree_leaves(inputs), pytree.tree_leaves(fresh), strict=True)
    if all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
        raise ValueError(
            f"{call}: the other samples were replaced by equal ones, which shows nothing; pass "
            "replace=, inputs that differ"
        )
    return fresh


def _check_pool(call: str, inputs: Any, rows: Rows, pool: Any) -> None:
    leaves, spec = pytree.tree_flatten(inputs)
    sources, other_spec = pytree.tree_flatten(pool)
    if spec != other_spec:
        raise TypeError(f"{call}: replace must have the structure of inputs, {spec}")
    length = count_samples(call, "replace", pool)
    for leaf, source in zip(leaves, sources, strict=True):
        if not rows.has(leaf):
            continue
        shape = tuple(getattr(source, "shape", ()))
        if length < 1 or shape != (length, *leaf.shape[1:]):
            raise ValueError(
                f"{call}: replace must have samples like those of inputs, [M, "
                f"{', '.join(map(str, leaf.shape[1:]))}] with M from 1, got shape {shape}"
            )
        if not torch.can_cast(source.dtype, leaf.dtype):
            raise TypeError(
                f"{call}: replace must have numbers that inputs can hold, {leaf.dtype}, "
                f"got {source.dtype}"
            )


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple or list is several, a dict is by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
