"""Whether a forward pass is run again inside a backward pass."""

from collections.abc import Hashable
from typing import NamedTuple

import torch

_MOST_NOTES = 256


def is_recomputation() -> bool:
    """Whether this runs inside a backward pass, where activation checkpoints repeat forwards."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class _Note(NamedTuple):
    """A forward that may be repeated.

    Attributes:
        kind: the same for a forward and its repetition.
        hooked: whether it ran under saved-tensor hooks, as in checkpoints that are not reentrant.
        moved: whether it moved statistics, or repeated one that had.
    """

    kind: Hashable
    hooked: bool
    moved: bool


class Forwards:
    """The forwards of one layer that a checkpoint may repeat, and whether each moved statistics.

    Those are forwards without gradient (reentrant checkpoints) and under saved-tensor hooks (the
    others). One outside of a checkpoint may be among them, which is repeated by nobody and stays.
    """

    def __init__(self) -> None:
        self._notes: list[_Note] = []
        # Of repetitions that will be repeated themselves, in nested checkpoints.
        self._nested: list[_Note] = []

    def begin(self, kind: Hashable, tracked: bool) -> tuple[bool, bool]:
        """Take note of a forward.

        Args:
            kind: the same for a forward and its repetition.
            tracked: whether statistics are to be moved, if they have not been.

        Returns:
            Whether statistics have to be moved, and whether this forward repeats another.
        """
        if _is_plain() and not self._nested:
            return tracked, False
        first = None
        notes = self._notes
        if is_recomputation():
            first, notes = self._find(kind), self._nested
        elif self._nested:
            self._nested.clear()
        moved = first is not None and first.moved
        moves = tracked and not moved
        if notes is self._notes or first is not None:
            hooked = _is_hooked()
            if hooked or not torch.is_grad_enabled():
                notes.append(_Note(kind, hooked, moves or moved))
                del notes[:-_MOST_NOTES]
        return moves, first is not None

    def _find(self, kind: Hashable) -> _Note | None:
        """Remove and return the note of the forward that is repeated: the last of this kind."""
        hooked = _is_hooked()
        for notes in (self._notes, self._nested):
            same = [i for i, note in enumerate(notes) if note.kind == kind]
            if same:
                return notes.pop(max(same, key=lambda i: (notes[i].hooked == hooked, i)))
        return None


def _is_plain() -> bool:
    """Whether this forward neither repeats another nor can be repeated."""
    return torch.is_grad_enabled() and not is_recomputation() and not _is_hooked()


def _is_hooked() -> bool:
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None
