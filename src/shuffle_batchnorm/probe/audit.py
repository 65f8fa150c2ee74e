"""Audit: do outputs depend on the other samples of the batch, how much, and through what?"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shuffle_batchnorm.comm import agreement, failures
from shuffle_batchnorm.comm.world import ProcessGroupLike, World, check_process_group, resolve
from shuffle_batchnorm.shuffle.state import set_shuffle_state

from .audit_report import AuditReport
from .checks import total
from .isolation import (
    all_modules,
    derive_seed,
    draw_seed,
    eager,
    isolated,
    seed_all,
    shuffle_worlds,
)
from .others import arguments, choose_rows, count_samples, replace_others
from .patching import TOLERANCE, Calls, Rows, candidates, find_mixing, patched, recording
from .progress import Console
from .shapley import Coalition, draw_orders, list_coalitions, mean_intervals, shapley_values

CALL = "audit"
CONFIDENCE = 0.95
_Recorded = tuple[Calls, Calls]  # of the modules that mix: in the base and in the fresh pass


def audit(
    model: nn.Module,
    inputs: Any,
    *,
    probes: Sequence[int] | Tensor | None = None,
    replace: Any = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    process_group: ProcessGroupLike = None,
) -> AuditReport:
    r"""Measure how much outputs depend on the batch's other samples, and through which modules.

    .. math:: \text{dependence} = \frac{\text{rms}_i(f(x)_i - f(x')_i)}{\text{spread}(f(x))}

    i are the probes, x' is the batch with all other samples replaced. The spread is the root mean
    square distance of outputs from their mean over the samples. Both are taken over all numbers of
    all floating-point outputs. What does not mix samples gives exactly 0, since all passes have the
    same shapes, rows and random state.

    The shares are Shapley values. The players are the innermost modules that mix: those whose
    output for a probe changes when only the other samples in their input do; all calls of one
    module are one player; a container is one if its own code mixes. v(S) is the change of the
    probes' outputs when the modules in S see the other samples as in the pass over x', and the
    other modules as in the pass over x. So v(all) is the change above, which is verified. With up
    to 8 players all coalitions are valued; beyond, at least 4 pairs of orders in which players
    join, and twice the number of players.

    The model runs in the mode it is in, without gradients. Afterwards buffers, training flags,
    shuffle states and random states are what they were, also after an error.

    Cost: 8 passes (2 more for each level of nesting, if containers mix); then, for n players, 2^n,
    or beyond 8 about ``10 n`` and at least 128 coalitions. On one rank a pass values N / P of these
    if that reproduces the change (it doesn't with dropout), else one. Memory: twice that of a
    training step, as inputs and outputs of all modules are kept for a time.

    Communication: what the model does, called by all ranks; 4 KiB from every rank to every rank,
    and some numbers per module and pass.

    Args:
        model: any module; may be wrapped in a ShuffledEncoder, which is one player,
            DistributedDataParallel or ``torch.compile``.
        inputs: this rank's batch ``[N, *]``; a tuple or list of positional arguments; a dict of
            keyword arguments. Tensors with N rows hold samples, all else is handed on.
        probes: positions of the samples to watch; by default N / 8 of them, at least 1, evenly
            spread. Probes still see one another: take few.
        replace: inputs ``[M, *]`` that the other samples are drawn from, in the structure of
            `inputs`, without repetition if M is enough. None for the other samples themselves,
            drawn with repetition. Needed if there is one other sample.
        generator: gives the seed of all that is drawn, one number per call; seeded alike on all
            ranks. None for seed 0.
        progress: whether the first rank tells on stderr how far it is; None for: in a terminal
            only.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Returns:
        An `AuditReport`, the same on all ranks.

    Raises:
        TypeError: `model` is no module; no tensor in `inputs` or in the output; probes that are no
            ints; `replace` of another structure or with numbers that `inputs` can't hold.
        ValueError: fewer than 2 samples; probes out of range; other samples that can't be replaced
            or are replaced by equal ones; outputs that are not finite; a model that gives other
            outputs when it is called again; ranks that disagree.
        RuntimeError: patched passes don't reproduce the change; on the peers of a rank that fails.

    Source:
        Shapley values: Shapley 1953; of a model's parts: Ghorbani and Zou 2020, arXiv 2002.09815.

    Example:
        >>> from shuffle_batchnorm import audit
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> audit(model, torch.randn(16, 4)).shares
        {'1': 1.0}
        >>> audit(model.eval(), torch.randn(16, 4)).dependence
        0.0
    """
    check_process_group(CALL, process_group)
    world = resolve(process_group, CALL)
    seed = draw_seed(generator)
    error: Exception | None = None
    modules: dict[str, nn.Module] = {}
    try:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{CALL}: model must be a module, got {type(model).__name__}")
        modules = candidates([model])
        rows = choose_rows(CALL, count_samples(CALL, "inputs", inputs), probes)
        drawn = derive_seed(seed, world.rank, "others")
        fresh = replace_others(CALL, inputs, rows, replace, drawn)
    except (TypeError, ValueError) as caught:
        error = caught
    agreement.agree(CALL, {"seed": seed, "the number of modules": len(modules)}, error, world)
    console = Console(CALL, progress if world.rank == 0 else False)
    audited = _Audit(model, inputs, fresh, rows, seed, world, console)
    with torch.no_grad(), eager():
        try:
            return audited.report(modules)
        except Exception as failure:
            failures.announce(world, f"{CALL}: {failure}")
            raise


class _Audit:
    """The passes of one call, on one rank."""

    def __init__(
        self,
        model: nn.Module,
        base: Any,
        fresh: Any,
        rows: Rows,
        seed: int,
        world: World,
        console: Console,
    ) -> None:
        self.model, self.base, self.fresh, self.rows = model, base, fresh, rows
        self.seed, self.world, self.console = seed, world, console
        self.isolate = list(all_modules([model]).values())
        self.worlds = shuffle_worlds(self.isolate, world)

    def report(self, modules: dict[str, nn.Module]) -> AuditReport:
        everything = self._outputs(self.base, self.rows.count)
        terms = {"the numbers in a sample's outputs": everything.shape[1]}
        agreement.agree(CALL, terms, None, self.world)
        trained = everything[self.rows.probes]
        fresh = self._outputs(self.fresh, self.rows.count)[self.rows.probes]
        change, spread = self._rms(fresh - trained), self._spread(everything)
        samples, probes = self._sum(self.rows.count, len(self.rows.probes))
        shares: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        if change:
            calls, each = self._find(modules.values(), trained, fresh, change)
            names = {module: name for name, module in modules.items()}
            players = list(calls[0])
            values = self._values(calls, each, trained, change)
            found = shapley_values(len(players), self._orders(len(players)), values) / change
            spans = mean_intervals(found, CONFIDENCE)
            means = found.mean(dim=0).tolist()
            shares = dict(zip([names[player] for player in players], means, strict=True))
            intervals = dict(zip(shares, spans, strict=True))
        # What differs by the rounding of a mean alone is the same.
        is_spread = spread > 1e-12 * self._rms(everything)
        dependence = 0.0 if not change else change / spread if is_spread else math.inf
        kinds = {name: type(modules[name]).__name__ for name in shares}
        return AuditReport(dependence, shares, intervals, kinds, int(samples), int(probes))

    def _find(
        self, modules: Iterable[nn.Module], trained: Tensor, fresh: Tensor, change: float
    ) -> tuple[_Recorded, int]:
        """Return the calls of the modules that mix, and how many coalitions to value in a pass.

        Modules that contain others are tried only if those that don't are not all that mix.
        """
        modules = list(modules)
        innermost = [module for module in modules if not list(module.children())]
        for some in (innermost, modules):
            calls = self._record(some, trained)
            stack = self.rows.count // len(self.rows.probes)
            if self.world.size == 1 and stack > 1:
                with suppress(Exception):  # a model for batches of one size may raise anything
                    if self._distance(calls, stack, trained, fresh) <= TOLERANCE * change:
                        return calls, stack
            off = self._distance(calls, 1, trained, fresh) / change
            if off <= TOLERANCE:
                return calls, 1
        raise RuntimeError(
            f"{CALL}: passes with patched modules don't reproduce the change (off by {off:.2g} of "
            f"it): {type(self.model).__name__} keeps something of a batch outside buffers, hands "
            "samples on in another order than they came, or mixes them in a hook of its own"
        )

    def _record(self, modules: list[nn.Module], trained: Tensor) -> _Recorded:
        """Return the base and fresh calls of those modules that mix."""
        with recording(modules) as fresh_calls:
            self._pass(self.fresh)
        players = find_mixing(
            lambda: self._pass(self.base),
            modules,
            self.rows,
            fresh_calls,
            self.worlds,
            lambda said: bool(self._sum(float(said))[0]),
        )
        with recording(players) as base_calls:
            again = self._outputs(self.base, self.rows.count)[self.rows.probes]
        if self._rms(again - trained):
            raise ValueError(
                f"{CALL}: {type(self.model).__name__} gives other outputs when it is called "
                "again with the same inputs, buffers and random state, so a change may be chance"
            )
        return base_calls, {player: fresh_calls[player] for player in players}

    def _distance(self, calls: _Recorded, each: int, trained: Tensor, fresh: Tensor) -> float:
        """Return how far the two passes that can be checked are from the real ones."""
        ends = [[], list(calls[0])]
        if each > 1:
            found = self._patched(calls, ends * (each // 2), each)[:2]
        else:
            found = [self._patched(calls, [end], 1)[0] for end in ends]
        return max(self._rms(found[0] - trained), self._rms(found[1] - fresh))

    def _patched(
        self, calls: _Recorded, coalitions: Sequence[Sequence[nn.Module]], each: int
    ) -> list[Tensor]:
        """Return the probes' outputs for each coalition: one, or some in one pass."""
        with patched(self.rows, *calls, coalitions, each > 1):
            if each == 1:
                return [self._outputs(self.base, self.rows.count)[self.rows.probes]]
            index = self.rows.probes.repeat(len(coalitions))
            stack = pytree.tree_map(
                lambda leaf: leaf[index] if self.rows.has(leaf) else leaf, self.base
            )
            return list(self._outputs(stack, len(index)).chunk(len(coalitions)))

    def _values(
        self, calls: _Recorded, each: int, trained: Tensor, change: float
    ) -> dict[Coalition, float]:
        """Return v of all coalitions that are asked for, valued so many in a pass."""
        players = list(calls[0])
        none, everyone = frozenset[int](), frozenset(range(len(players)))
        values = {none: 0.0, everyone: change}
        coalitions = list_coalitions(len(players), self._orders(len(players)))
        inner = [coalition for coalition in coalitions if coalition not in values]
        for number in self.console.count("pass", -(-len(inner) // each)):
            some = inner[number * each : (number + 1) * each]
            # As many as in all passes: a kernel may add up in another order for other sizes.
            filled = some + [none] * (each - len(some))
            outputs = self._patched(calls, [[players[k] for k in c] for c in filled], each)
            changes = [self._rms(output - trained) for output in outputs]
            values.update(zip(some, changes, strict=False))
        return values

    def _orders(self, players: int) -> Sequence[Sequence[int]]:
        return draw_orders(players, derive_seed(self.seed, "orders"))

    def _pass(self, inputs: Any) -> Any:
        """Return the model's output for a copy of its inputs, and leave no trace."""
        args, kwargs = arguments(
            pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), inputs)
        )
        with isolated(self.isolate, self.worlds):
            seed_all(derive_seed(self.seed, self.world.rank, "pass"))
            for world in self.worlds:
                set_shuffle_state((derive_seed(self.seed, "shuffle"), 0), world.group)
            return self.model(*args, **kwargs)

    def _outputs(self, inputs: Any, count: int) -> Tensor:
        """Return all numbers that the model gives for each sample: ``[count, D]``, float64."""
        output = self._pass(inputs)
        leaves = [
            leaf.detach().to("cpu", torch.float64).reshape(count, -1)
            for leaf in pytree.tree_leaves(output)
            if isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.ndim
            and len(leaf) == count
            and leaf.numel()
        ]
        if not leaves:
            kind = (
                f"shape {tuple(output.shape)}"
                if isinstance(output, Tensor)
                else type(output).__name__
            )
            raise TypeError(
                f"{CALL}: the model must return a floating-point tensor [{count}, *] or a tree "
                f"with one, got {kind}"
            )
        found = torch.cat(leaves, dim=1)
        if not found.isfinite().all():
            raise ValueError(f"{CALL}: the model returned numbers that are not finite")
        return found

    def _rms(self, difference: Tensor) -> float:
        squares, numbers = self._sum(float(difference.square().sum()), difference.numel())
        return math.sqrt(squares / numbers)

    def _spread(self, outputs: Tensor) -> float:
        count = outputs.new_full((1,), len(outputs))
        sums = total(torch.cat([outputs.sum(dim=0), count]), self.world, CALL)
        return self._rms(outputs - sums[:-1] / sums[-1])

    def _sum(self, *numbers: float) -> list[float]:
        row = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        found: list[float] = total(row, self.world, CALL).tolist()
        return found
