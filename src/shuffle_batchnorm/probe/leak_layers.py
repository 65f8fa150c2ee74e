"""Through which modules of a key encoder the leak comes: passes with some of them patched."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from shuffle_batchnorm.comm.world import World

from .checks import total
from .isolation import isolated
from .patching import TOLERANCE, Calls, Rows, Run, find_mixing, patched, recording
from .shapley import Coalition, draw_orders, list_coalitions, shapley_values

CALL = "measure_leak"


class Layers:
    """The modules of a key encoder that mix samples: none before `find`.

    Args:
        used: all modules whose state passes may change.
        worlds: groups whose shuffle states they may change.
        world: the ranks.

    Attributes:
        names: of the modules that mix.
        searched: whether these have been searched for.
    """

    def __init__(self, used: Iterable[nn.Module], worlds: Sequence[World], world: World) -> None:
        self.used, self.worlds, self.world = list(used), worlds, world
        self.names: list[str] = []
        self.searched = False
        self.players: list[nn.Module] = []

    def find(self, modules: Mapping[str, nn.Module], rows: Rows, base: Run, fresh: Run) -> None:
        """Find the modules that mix in a base and a fresh pass; see `find_mixing`."""

        def on_any_rank(said: bool) -> bool:
            row = torch.tensor([float(said)], device="cpu")
            return bool(total(row, self.world, CALL))

        with self._kept(), recording(modules.values()) as calls:
            fresh()
        with self._kept():
            self.players = find_mixing(base, calls, rows, calls, self.worlds, on_any_rank)
        self.searched = True
        names = {module: name for name, module in modules.items()}
        self.names = [names[player] for player in self.players]

    def coalitions(self, seed: int) -> list[Coalition]:
        """Return the coalitions to patch in a batch, that of all modules as the last."""
        count = len(self.players)
        found = list_coalitions(count, draw_orders(count, seed, pairs=1))
        inner = [coalition for coalition in found if 0 < len(coalition) < count]
        return [*inner, frozenset(range(count))] if count else []

    def parts(self, lost: Mapping[Coalition, float], seed: int) -> Tensor:
        """Return the part of each module, ``[n]``, in what is lost with all of them patched."""
        count = len(self.players)
        if not count:
            return torch.zeros(0, device="cpu")
        return shapley_values(count, draw_orders(count, seed, pairs=1), lost)[0]

    def describe(
        self, parts: Tensor, interval_of: Callable[[Tensor], tuple[float, tuple[float, float]]]
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Return each module's part of the leak and its interval, from ``[batches, n]`` per rank.

        Communication: one sum over all ranks of so many numbers.
        """
        if not self.names:
            return {}, {}
        columns = total(parts, self.world, CALL).unbind(dim=1)
        means = [float(column.mean()) for column in columns]
        intervals = [interval_of(column)[1] for column in columns]
        return (
            dict(zip(self.names, means, strict=True)),
            dict(zip(self.names, intervals, strict=True)),
        )

    def recording(self) -> AbstractContextManager[Calls]:
        """Record the calls of the modules in a base pass."""
        return recording(self.players)

    def patched(
        self, rows: Rows, calls: Calls, base: Run, fresh: Run, coalitions: Iterable[Coalition]
    ) -> Iterator[object]:
        """Yield what a base pass returns with the modules of each coalition patched.

        What else the passes change is restored after each.
        """
        if not self.players:
            return
        with self._kept(), recording(self.players) as fresh_calls:
            fresh()
        for coalition in coalitions:
            players = [self.players[k] for k in coalition]
            with self._kept(), patched(rows, calls, fresh_calls, [players], stacked=False):
                output = base()
            yield output

    def _kept(self) -> AbstractContextManager[None]:
        return isolated(self.used, self.worlds)


def check_patched(patched: Tensor, fresh: Tensor, trained: Tensor) -> None:
    """Raise a RuntimeError unless keys with all modules patched are those of the fresh batch."""
    off, change = ((fresh - other).norm() for other in (patched, trained))
    if off > TOLERANCE * change:
        raise RuntimeError(
            f"{CALL}: with by_layer=True keys must depend on their batch through modules that can "
            f"be found in encode_key; passes with these patched don't reproduce the fresh batch "
            f"(off by {float(off / change):.2g} of the change). Name the others in modules="
        )
