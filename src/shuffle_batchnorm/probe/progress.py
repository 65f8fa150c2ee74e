"""How far a long call or command is, on stderr: a line in a terminal, lines in a log file.

In a terminal the last line is written over and over. Elsewhere every line stays, so there are few:
of work that is counted one per tenth, none sooner than `PAUSE` seconds after the one before.

Work goes on where nobody can read of it any more: stderr is missing, or a pipe whose reader has
gone. An error here would end one rank alone, and its peers would wait for it.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

PAUSE = 5.0  # seconds between two lines in a log
REDRAW = 0.1  # seconds between two drawings in a terminal
WIDTH = 10  # characters of the bar: figures have to fit behind it
_CLEAR = "\r\x1b[K"


class Console:
    """Says on stderr what a call is doing.

    Args:
        call: what stands before every line.
        shown: whether to write; None for: in a terminal only.
    """

    def __init__(self, call: str, shown: bool | None = None) -> None:
        self.call = call
        self.shown = _is_terminal() if shown is None else shown
        self.in_terminal = self.shown and _is_terminal()

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self.shown:
            write_line(f"{self.call}: {text}")

    def status(self, text: str) -> None:
        """Tell what begins now; in a terminal, what is written next takes its place."""
        if self.in_terminal:
            _draw(f"{self.call}: {text}")
        else:
            self.say(text)

    def close(self) -> None:
        """Remove what would be written over."""
        if self.in_terminal:
            _write(_CLEAR)

    def count(self, name: str, total: int) -> Iterator[int]:
        """Yield the numbers below `total`, and tell how far it is.

        Args:
            name: what is counted, in the singular.
            total: how many there are.
        """
        bar = Bar(self, name, total)
        try:
            for number in range(total):
                yield number
                bar.advance()
        finally:
            self.close()


SILENT = Console("", shown=False)


class Bar:
    """How much of a piece of work is done.

    Args:
        console: where it is shown.
        name: what is counted, in the singular.
        total: how many there are.
        done: how many were done before.
    """

    def __init__(self, console: Console, name: str, total: int, done: int = 0) -> None:
        self.console, self.name, self.total = console, name, total
        self.done = self._first = done
        self.text = ""  # figures that follow
        self._begun = self._written = time.monotonic()
        self.show()

    def advance(self) -> None:
        """Count one more."""
        self.done += 1
        if not self.console.shown:
            return
        now = time.monotonic()
        if self.console.in_terminal:
            if now - self._written >= REDRAW:
                self.show()
                self._written = now
        elif now - self._written >= PAUSE and self.done < self.total and self._is_tenth():
            self.console.say(f"{self._share():3.0f} %, {self._state(with_count=True)}")
            self._written = now

    def _is_tenth(self) -> bool:
        return 10 * self.done // self.total > 10 * (self.done - 1) // self.total

    def show(self) -> None:
        """Draw it in a terminal, where something else has taken its place."""
        if self.console.in_terminal:
            filled = WIDTH * self.done // max(self.total, 1)
            bar = "#" * filled + "." * (WIDTH - filled)
            # The figures have to fit into 80 columns: they take the place of the count.
            _draw(
                f"{self.console.call}: [{bar}] {self._share():3.0f} %, {self._state(not self.text)}"
            )

    def _share(self) -> float:
        return 100 * self.done / max(self.total, 1)

    def _left(self) -> str:
        if self.done == self._first:
            return ""
        each = (time.monotonic() - self._begun) / (self.done - self._first)
        return f"{timedelta(seconds=round(each * (self.total - self.done)))} left"

    def _state(self, with_count: bool) -> str:
        """Return what is done, if wanted, what is left, and the figures."""
        count = f"{self.name} {self.done} of {self.total}" if with_count else ""
        return "; ".join(filter(None, [", ".join(filter(None, [count, self._left()])), self.text]))


def write_line(text: str) -> None:
    """Write a line on stderr, in place of one that would be written over."""
    _write(f"{_CLEAR if _is_terminal() else ''}{text}\n")


def _draw(text: str) -> None:
    """Write what the next line takes the place of; it must not be wider than the terminal."""
    _write(f"{_CLEAR}{text[: _width() - 1]}")


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        if sys.stderr is not None:  # as with 2>&-
            print(text, end="", file=sys.stderr, flush=True)


def _width() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return columns or 80
