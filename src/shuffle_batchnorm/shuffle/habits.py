"""What a group's next call will be if it goes on as before: then one message is enough for it.

A guess takes no communication, since all ranks have made the same calls. It may be wrong; then one
message was for nothing, and the guess has to prove itself for longer and longer.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from shuffle_batchnorm.comm.world import World

_MEMORY = 4  # calls that a guess is made from: enough for two shuffles, then two unshuffles
_MOST_GUESSES = 64
_LONGEST_PROOF = 64


class Form(NamedTuple):
    """What a rank has to know of a call before it can take part in its message."""

    call: str
    n: int  # samples on every rank, divisible by the number of ranks
    width: int  # bytes of a message per sample


@dataclass
class _Guess:
    form: Form | None  # None: of no such form
    right: int = 1  # how often in a row
    needed: int = 1  # how often it has to be until it is trusted


@dataclass
class _Habit:
    last: tuple[Form | None, ...] = ()
    guesses: dict[tuple[Form | None, ...], _Guess] = field(default_factory=dict)


_habits: "WeakKeyDictionary[Any, _Habit]" = WeakKeyDictionary()


def expected_form(world: World) -> Form | None:
    """Return the form of the next call, the same on all ranks; None if that is not known."""
    habit = _habits.get(world.group)
    guess = None if habit is None else habit.guesses.get(habit.last)
    return None if guess is None or guess.right < guess.needed else guess.form


def note_form(world: World, form: Form | None) -> None:
    """Note the form of a call that all ranks have made; None for one that has no such form."""
    habit = _habits.setdefault(world.group, _Habit())
    guess = habit.guesses.get(habit.last)
    if guess is None:
        if len(habit.guesses) >= _MOST_GUESSES:
            habit.guesses.clear()
        habit.guesses[habit.last] = _Guess(form)
    elif guess.form == form:
        guess.right += 1
    else:
        if guess.right >= guess.needed:
            guess.needed = min(2 * guess.needed, _LONGEST_PROOF)
        guess.form, guess.right = form, 1
    habit.last = (*habit.last, form)[-_MEMORY:]
