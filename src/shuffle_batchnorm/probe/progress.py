"""A line on stderr that tells how far a long call is."""

import sys
import time
from collections.abc import Iterator


def count_batches(call: str, batches: int, shown: bool | None) -> Iterator[int]:
    """Yield the numbers of the batches, and write which one it is and how long the rest takes.

    Args:
        call: what is written before it.
        batches: how many there are.
        shown: whether to write; None for: if stderr is a terminal. There the line is written over
            and over and removed at the end; elsewhere each is a line of its own.
    """
    terminal = sys.stderr.isatty()
    if not (terminal if shown is None else shown):
        yield from range(batches)
        return
    before, after = ("\r", "\x1b[K") if terminal else ("", "\n")
    begin, left = time.monotonic(), ""
    try:
        for number in range(batches):
            if number:
                seconds = (time.monotonic() - begin) / number * (batches - number)
                left = f", about {seconds:.0f} s left"
            line = f"{before}{call}: batch {number + 1} of {batches}{left}{after}"
            print(line, end="", file=sys.stderr, flush=True)
            yield number
    finally:
        if terminal:
            print(f"{before}{after}", end="", file=sys.stderr, flush=True)
