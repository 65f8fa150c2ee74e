"""The sign of life of a long call: where it is written, and what."""

import io
import sys
import time

import pytest

from shuffle_batchnorm.probe.progress import count_batches


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write(monkeypatch: pytest.MonkeyPatch, file: io.StringIO) -> io.StringIO:
    """Make it stderr, with 3 seconds between two looks at the clock."""
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    return file


@pytest.mark.parametrize("shown", [None, True])
def test_a_terminal_has_one_line_which_goes(
    shown: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(monkeypatch, Terminal())
    assert list(count_batches("measure_leak", 3, shown)) == [0, 1, 2]
    assert written.getvalue().split("\r")[1:] == [
        "measure_leak: batch 1 of 3\x1b[K",
        "measure_leak: batch 2 of 3, about 6 s left\x1b[K",
        "measure_leak: batch 3 of 3, about 3 s left\x1b[K",
        "\x1b[K",
    ]


def test_an_error_leaves_no_half_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback that is written behind the count."""
    written = write(monkeypatch, Terminal())
    with pytest.raises(ZeroDivisionError):
        [1 / number for number in count_batches("measure_leak", 3, None)]
    assert written.getvalue().endswith("\r\x1b[K")


def test_a_file_has_lines_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    written = write(monkeypatch, io.StringIO())
    assert list(count_batches("measure_leak", 2, True)) == [0, 1]
    lines = "measure_leak: batch 1 of 2\nmeasure_leak: batch 2 of 2, about 3 s left\n"
    assert written.getvalue() == lines


@pytest.mark.parametrize(
    ("kind", "shown"), [(io.StringIO, None), (io.StringIO, False), (Terminal, False)]
)
def test_else_nothing_is_written(
    kind: type[io.StringIO], shown: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a log file full of counts that nobody asked for."""
    written = write(monkeypatch, kind())
    assert list(count_batches("measure_leak", 2, shown)) == [0, 1]
    assert written.getvalue() == ""
