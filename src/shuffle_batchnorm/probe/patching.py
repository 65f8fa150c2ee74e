"""Run a model with chosen modules seeing other samples in its batch than the rest of it sees.

The probes are some rows of a batch; the others are all other rows. Two passes are recorded: one
over the batch as it is (*base*), one with all others replaced (*fresh*). In a patched pass, at each
call of a module that mixes samples, the probes' rows are those of the moment and the others' rows
are the recorded ones, base or fresh: in its input those of this module, in its output those of the
module around it that mixes as well. So the others never depend on what was patched before.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.shuffle.encoder import ShuffledEncoder

from .isolation import all_modules, isolated

TOLERANCE = 1e-4  # of what patched passes may differ from real ones, relative to the change
Run = Callable[[], Any]
Leaves = list[Any]  # a tree of arguments or of what is returned, flattened
Around = Callable[..., Any]  # of (module, its forward, *args, **kwargs)


class Call(NamedTuple):
    """Copies of what a module was given and has returned."""

    inputs: Leaves
    outputs: Leaves


Calls = dict[nn.Module, list[Call]]  # of every module, in order


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

    def complete(self, leaves: Leaves, recorded: Leaves) -> Leaves:
        """Return recorded leaves with the probes' rows of the present ones.

        The present ones may have all rows or those of the probes. What has no row for each sample
        stays.
        """
        if len(recorded) != len(leaves):
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
    """Record all calls of modules inside a ``with`` block."""
    calls: Calls = {module: [] for module in modules}

    def around(module: nn.Module, forward: Around, *args: Any, **kwargs: Any) -> Any:
        call = Call(_copies((args, kwargs)), [])
        calls[module].append(call)
        output = forward(*args, **kwargs)
        call.outputs.extend(_copies(output))
        return output

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
        self.stacked = stacked
        # Inside a call of a whole batch: its coalition, and the innermost module patched.
        self.active = None if stacked else coalitions[0]
        self.inside: nn.Module | None = None

    def __call__(self, module: nn.Module, forward: Around, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.active is not None:
            return self._call(self.active, module, forward, leaves, spec)
        before, outputs = self.counts.copy(), []
        for k, coalition in enumerate(self.coalitions):
            self.counts, self.active = before.copy(), coalition
            parts = [self._part(leaf, k) for leaf in leaves]
            outputs.append(self._call(coalition, module, forward, parts, spec))
        self.active = None
        flat, specs = zip(*map(pytree.tree_flatten, outputs), strict=True)
        return pytree.tree_unflatten(list(map(self._stack, zip(*flat, strict=True))), specs[0])

    def _call(
        self,
        coalition: set[nn.Module],
        module: nn.Module,
        forward: Around,
        leaves: Leaves,
        spec: Any,
    ) -> Any:
        number, outside = self.counts[module], self.inside
        self.counts[module] += 1
        given = _call(self.fresh if module in coalition else self.base, module, number)
        returned = _call(self.fresh if outside in coalition else self.base, module, number)
        args, kwargs = pytree.tree_unflatten(self.rows.complete(leaves, given.inputs), spec)
        self.inside = module
        output = forward(*args, **kwargs)
        self.inside = outside
        if outside is None and self.stacked:  # only the probes go on
            return output
        outputs, spec = pytree.tree_flatten(output)
        return pytree.tree_unflatten(self.rows.complete(outputs, returned.outputs), spec)

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
    return list(search.base)


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
        self.base: Calls = {}  # of the modules found
        self.patch: _Patch | None = None  # while a module is called again

    def __call__(self, module: nn.Module, forward: Around, *args: Any, **kwargs: Any) -> Any:
        if self.patch is not None:
            around = functools.partial(self.patch, module, forward)
            return (around if module in self.base else forward)(*args, **kwargs)
        number = self.counts[module]
        self.counts[module] += 1
        before, inputs = self.counts.copy(), _copies((args, kwargs))
        output = forward(*args, **kwargs)
        is_known = module in self.base
        calls = self.base.setdefault(module, [])
        calls += [_NONE] * (number - len(calls)) + [Call(inputs, _copies(output))]
        if not is_known and not self._mixes(module, forward, (args, kwargs), number, before):
            del self.base[module]
        return output

    def _mixes(
        self,
        module: nn.Module,
        forward: Around,
        arguments: Any,
        number: int,
        before: "Counter[nn.Module]",
    ) -> bool:
        inputs, outputs = self.base[module][number].inputs, []
        others = _call(self.fresh, module, number).inputs
        if self.on_any_rank(not self._comparable(inputs, others)):
            return False
        args, kwargs = pytree.tree_unflatten(inputs, pytree.tree_structure(arguments))
        for coalition in (set[nn.Module](), {module}):
            self.patch = _Patch(self.rows, self.base, self.fresh, [coalition], stacked=False)
            self.patch.counts = before.copy()
            self.patch.counts[module] = number
            with isolated(all_modules([module]).values(), self.worlds):
                outputs.append(self.rows.of(self.patch(module, forward, *args, **kwargs)))
        self.patch = None
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


def _call(calls: Mapping[nn.Module, list[Call]], module: nn.Module, number: int) -> Call:
    """Return what was recorded of one call; nothing if there was no such call."""
    found = calls.get(module, [])
    return found[number] if number < len(found) else _NONE


_NONE = Call([], [])


def _copies(tree: Any) -> Leaves:
    """Return copies of a tree's leaves, since a module may work in place."""
    leaves = pytree.tree_leaves(tree)
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
