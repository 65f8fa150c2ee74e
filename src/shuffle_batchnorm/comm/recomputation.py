"""Whether a forward pass is run again inside a backward pass."""

from collections import Counter
from collections.abc import Hashable

import torch

_MOST_KINDS = 256


def is_recomputation() -> bool:
    """Whether this runs inside a backward pass, where activation checkpoints repeat forwards."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class Forwards:
    """The forwards of one layer that a checkpoint may repeat, and whether each moved statistics.

    Those are forwards without gradient (reentrant checkpoints) and under saved-tensor hooks (the
    others). One outside of a checkpoint may be among them, which is repeated by nobody and stays.
    """

    def __init__(self) -> None:
        self._open: Counter[tuple[Hashable, bool]] = Counter()
        # Repetitions that will be repeated themselves, in nested checkpoints.
        self._nested: Counter[tuple[Hashable, bool]] = Counter()

    def begin(self, kind: Hashable, tracked: bool) -> tuple[bool, bool]:
        """Take note of a forward.

        Args:
            kind: the same for a forward and its repetition.
            tracked: whether statistics are to be moved, if they have not been.

        Returns:
            Whether statistics have to be moved, and whether this forward repeats another.
        """
        repeats, moved = False, False
        nested = is_recomputation()
        if nested:
            repeats, moved = self._find(kind)
        elif self._nested:
            self._nested.clear()
        moves = tracked and not moved
        if not nested and _may_be_repeated():
            if len(self._open) >= _MOST_KINDS:
                self._open.clear()
            self._open[kind, moves] += 1
        elif repeats and _may_be_repeated():
            self._nested[kind, moves or moved] += 1
        return moves, repeats

    def _find(self, kind: Hashable) -> tuple[bool, bool]:
        """Return whether a forward of this kind waits for its repetition, and if it has moved."""
        for forwards in (self._open, self._nested):
            for moved in (False, True):
                if forwards[kind, moved]:
                    forwards[kind, moved] -= 1
                    return True, moved
        return False, False


def _may_be_repeated() -> bool:
    if not torch.is_grad_enabled():
        return True
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None
