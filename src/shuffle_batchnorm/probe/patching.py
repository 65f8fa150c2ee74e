"""Run a model with chosen modules seeing other samples in its batch than the rest of it sees.

The probes are some rows of a batch; the others are all other rows. Two passes are recorded: one
over the batch as it is (*base*), one with all others replaced (*fresh*). In a patched pass, at each
call of a module that mixes samples, the probes' rows are those of the moment and the others' rows
are the recorded ones, base or fresh. So the others never depend on what was patched before.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.shuffle.encoder import ShuffledEncoder

from .isolation import all_modules, isolated

Run = Callable[[], Any]
Leaves = list[Any]  # the arguments of a call, flattened
Calls = dict[nn.Module, list[Leaves]]  # of every module, in order
Around = Callable[..., Any]  # of (module, its forward, *args, **kwargs)


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch are probes.

    Attributes:
        count: N.
        probes: ``[P]``, int64, on the CPU.
    """

    count: int
    probes: Tensor

    def has(self, leaf: object) -> bool:
        """Return whether it is a tensor with a row for each sample."""
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == self.count

    def of(self, tree: Any) -> list[Tensor]:
        """Return the probes' rows of all tensors with a row for each sample."""
        return [leaf[self.probes] for leaf in pytree.tree_leaves(tree) if self.has(leaf)]

    def complete(self, leaves: Leaves, recorded: Leaves | None) -> Leaves:
        """Return recorded arguments with the probes' rows of the present ones.

        The present ones may have all rows or those of the probes. What has no row for each sample
        stays.
        """
        if recorded is None or len(recorded) != len(leaves):
            return leaves
        return [self._complete(*pair) for pair in zip(leaves, recorded, strict=True)]

    def _complete(self, leaf: Any, recorded: Any) -> Any:
        if not self.has(recorded) or not isinstance(leaf, Tensor):
            return leaf
        if leaf.shape[1:] != recorded.shape[1:]:
            return leaf
        own = leaf[self.probes] if len(leaf) == self.count else leaf
        if len(own) != len(self.probes):
            return leaf
        whole = recorded.clone()
        whole[self.probes] = own
        return whole


def candidates(roots: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return all modules by name, but those in a ShuffledEncoder: it gives rows another order.

    A root has the name of its class.
    """
    found = all_modules(roots)
    wrapped = [m for m in found.values() if isinstance(m, ShuffledEncoder)]
    inside = {id(m) for w in wrapped for m in all_modules([w]).values() if m is not w}
    return {
        name if name.strip("'") else type(module).__name__ + name: module
        for name, module in found.items()
        if id(module) not in inside
    }


@contextmanager
def interposed(modules: Iterable[nn.Module], around: Around) -> Iterator[None]:
    """Call `around` in place of each module's `forward` inside a ``with`` block.

    Not by hooks: these don't see a forward that is called by its name.
    """
    before = [(vars(module), vars(module).get("forward"), module.forward) for module in modules]
    try:
        for module, (attributes, _, forward) in zip(modules, before, strict=True):
            attributes["forward"] = functools.partial(around, module, forward)
        yield
    finally:
        for attributes, own, _ in before:
            if own is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = own


@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[Calls]:
    """Record copies of the arguments of all calls of modules inside a ``with`` block."""
    calls: Calls = {module: [] for module in modules}

    def around(module: nn.Module, forward: Around, *args: Any, **kwargs: Any) -> Any:
        calls[module].append(_copies(pytree.tree_leaves((args, kwargs))))
        return forward(*args, **kwargs)

    with interposed(calls, around):
        yield calls


@contextmanager
def patched(
    rows: Rows, base: Calls, fresh: Calls, coalitions: Sequence[Iterable[nn.Module]], stacked: bool
) -> Iterator[None]:
    """Give the modules of a coalition fresh others, and all other modules of `base` base others.

    Args:
        rows: of the recorded batches.
        base: what was recorded in the base pass, of all modules that mix.
        fresh: the same of the fresh pass.
        coalitions: one; several if stacked.
        stacked: whether what runs inside takes no batch but the probes alone, once for each
            coalition: ``[K * P, *]``. Each call of a module that mixes is then K calls with whole
            batches.
    """
    with interposed(base, _Patch(rows, base, fresh, list(map(set, coalitions)), stacked)):
        yield


class _Patch:
    """What stands around modules in `patched`."""

    def __init__(
        self,
        rows: Rows,
        base: Calls,
        fresh: Calls,
        coalitions: list[set[nn.Module]],
        stacked: bool,
    ) -> None:
        self.rows, self.base, self.fresh, self.coalitions = rows, base, fresh, coalitions
        self.counts: Counter[nn.Module] = Counter()
        # Inside a call of a whole batch: its coalition.
        self.active = None if stacked else coalitions[0]

    def __call__(self, module: nn.Module, forward: Around, *args: Any, **kwargs: Any) -> Any:
        number = self.counts[module]
        self.counts[module] += 1
        leaves, spec = pytree.tree_flatten((args, kwargs))

        def call(leaves: Leaves, coalition: set[nn.Module]) -> Any:
            recorded = _call(self.fresh if module in coalition else self.base, module, number)
            args, kwargs = pytree.tree_unflatten(self.rows.complete(leaves, recorded), spec)
            return forward(*args, **kwargs)

        if self.active is not None:
            return call(leaves, self.active)
        before, outputs = self.counts.copy(), []
        for k, coalition in enumerate(self.coalitions):
            self.counts, self.active = before.copy(), coalition
            outputs.append(call([self._part(leaf, k) for leaf in leaves], coalition))
        self.active = None
        flat, specs = zip(*map(pytree.tree_flatten, outputs), strict=True)
        return pytree.tree_unflatten(list(map(self._stack, zip(*flat, strict=True))), specs[0])

    def _part(self, leaf: Any, k: int) -> Any:
        each = len(self.rows.probes)
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == each * len(self.coalitions):
            return leaf[k * each : (k + 1) * each]
        return leaf

    def _stack(self, leaves: Sequence[Any]) -> Any:
        if self.rows.has(leaves[0]):
            return torch.cat([leaf[self.rows.probes] for leaf in leaves])
        return leaves[0]


def find_mixing(
    run: Run,
    modules: Iterable[nn.Module],
    rows: Rows,
    fresh: Calls,
    worlds: Iterable[World],
    on_any_rank: Callable[[bool], bool],
) -> list[nn.Module]:
    """Return the innermost modules that mix samples, in the order in which their calls end.

    A module mixes if the probes' rows of its output change when the others' rows of its input are
    the fresh ones, and the modules inside it that mix see the base ones. Not found are modules
    without a row for each sample in input and output, or with another argument that changes: what
    they do is found as their container's.

    Communication: with several ranks, one sum of a number before each module's call is repeated,
    and one after; and that of the calls.

    Args:
        run: the base pass.
        modules: those that may be called in it.
        rows: of the batch.
        fresh: what was recorded of all modules in the fresh pass.
        worlds: groups whose shuffle states the modules may change.
        on_any_rank: whether something is so on any rank.
    """
    search = _Search(rows, fresh, list(worlds), on_any_rank)
    with interposed(modules, search):
        run()
    return list(search.found)


class _Search:
    """What stands around modules in `find_mixing`."""

    def __init__(
        self,
        rows: Rows,
        fresh: Calls,
        worlds: list[World],
        on_any_rank: Callable[[bool], bool],
    ) -> None:
        self.rows, self.fresh, self.worlds, self.on_any_rank = rows, fresh, worlds, on_any_rank
        self.counts: Counter[nn.Module] = Counter()
        self.found: dict[nn.Module, dict[int, Leaves]] = {}  # base arguments, by number of call
        self.holding = False

    def __call__(self, module: nn.Module, forward: Around, *args: Any, **kwargs: Any) -> Any:
        number = self.counts[module]
        self.counts[module] += 1
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.holding:
            held = self.found.get(module, {}).get(number)
            args, kwargs = pytree.tree_unflatten(self.rows.complete(leaves, held), spec)
            return forward(*args, **kwargs)
        base, before = _copies(leaves), self.counts.copy()
        output = forward(*args, **kwargs)
        if module in self.found or self._mixes(module, forward, base, spec, number, before):
            self.found.setdefault(module, {})[number] = base
        return output

    def _mixes(
        self,
        module: nn.Module,
        forward: Around,
        base: Leaves,
        spec: Any,
        number: int,
        before: "Counter[nn.Module]",
    ) -> bool:
        others = _call(self.fresh, module, number)
        if self.on_any_rank(others is None or not self._comparable(base, others)):
            return False
        after, outputs = self.counts, []
        self.holding = True
        for recorded in (base, others):
            self.counts = before.copy()
            args, kwargs = pytree.tree_unflatten(self.rows.complete(base, recorded), spec)
            with isolated(all_modules([module]).values(), self.worlds):
                outputs.append(self.rows.of(forward(*args, **kwargs)))
        self.holding, self.counts = False, after
        return self.on_any_rank(not all(map(torch.equal, *outputs)))

    def _comparable(self, base: Leaves, others: Leaves) -> bool:
        """Return whether two calls differ in samples alone."""
        if len(base) != len(others) or not any(map(self.rows.has, base)):
            return False
        pairs = [(a, b) for a, b in zip(base, others, strict=True) if isinstance(a, Tensor)]
        return all(
            isinstance(b, Tensor)
            and (a.shape, a.dtype) == (b.shape, b.dtype)
            and (self.rows.has(a) or torch.equal(a, b))
            for a, b in pairs
        )


def _call(calls: Mapping[nn.Module, list[Leaves]], module: nn.Module, number: int) -> Leaves | None:
    """Return what was recorded of one call; None if there was no such call."""
    found = calls.get(module, [])
    return found[number] if number < len(found) else None


def _copies(leaves: Leaves) -> Leaves:
    """Return copies, since a module may work in place."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
