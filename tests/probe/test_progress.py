"""What a long call says: in a terminal, in a log, and where nothing was asked for."""

import io
import sys

import pytest

from shuffle_batchnorm.probe import progress
from shuffle_batchnorm.probe.progress import SILENT, Bar, Console, write_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """What time it is; it goes on by `step` seconds with each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def write(
    monkeypatch: pytest.MonkeyPatch, file: io.StringIO, step: float = 3.0, columns: int = 80
) -> io.StringIO:
    """Make it stderr, with so many seconds between two looks at the clock."""
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "time", Clock(step))
    monkeypatch.setattr(progress, "_width", lambda: columns)
    return file


def drawn(file: io.StringIO) -> list[str]:
    """What a terminal has shown, one thing after the other in the same line."""
    return file.getvalue().split("\r\x1b[K")[1:]


@pytest.mark.parametrize("shown", [None, True])
def test_a_terminal_has_one_line_which_goes(
    shown: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(monkeypatch, Terminal())
    assert list(Console("measure_leak", shown).count("batch", 3)) == [0, 1, 2]
    assert "\n" not in written.getvalue()
    assert drawn(written) == [
        "measure_leak: [..........]   0 %, batch 0 of 3",
        "measure_leak: [###.......]  33 %, batch 1 of 3, 0:00:12 left",
        "measure_leak: [######....]  67 %, batch 2 of 3, 0:00:06 left",
        "measure_leak: [##########] 100 %, batch 3 of 3, 0:00:00 left",
        "",
    ]


def test_a_terminal_is_not_redrawn_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run of quick steps that spends its time on the screen."""
    written = write(monkeypatch, Terminal(), step=0.01)
    list(Console("train").count("step", 1000))
    assert 100 <= len(drawn(written)) <= 110


def test_a_narrow_terminal_keeps_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line that wraps, after which every drawing adds another."""
    written = write(monkeypatch, Terminal(), columns=40)
    list(Console("measure_leak").count("batch", 2))
    assert {len(line) for line in drawn(written)} == {39, 0}


def test_a_line_that_stays_takes_the_place_of_a_drawn_one(monkeypatch: pytest.MonkeyPatch) -> None:
    written = write(monkeypatch, Terminal())
    console = Console("train")
    console.status("reading digits")
    console.say("to runs/first")
    write_line("train: warning: few")
    console.close()
    assert drawn(written) == [
        "train: reading digits", "train: to runs/first\n", "train: warning: few\n", "",
    ]  # fmt: skip


def test_an_error_leaves_no_half_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback that is written behind the count."""
    written = write(monkeypatch, Terminal())
    with pytest.raises(ZeroDivisionError):
        [1 / number for number in Console("measure_leak").count("batch", 3)]
    assert written.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize("total", [10, 36, 99_991])
def test_a_log_has_a_line_per_tenth(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line per step of a long run, and one that counts what was done before."""
    written = write(monkeypatch, io.StringIO(), step=progress.PAUSE)
    list(Console("train", shown=True).count("step", total))
    shares = [int(line[6:10]) for line in written.getvalue().splitlines()]
    assert [share // 10 for share in shares] == list(range(1, 10))


def test_a_log_has_what_is_left_and_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    written = write(monkeypatch, io.StringIO(), step=60.0)
    bar = Bar(Console("train", shown=True), "step", 100, done=49)
    bar.text = "loss 3.100"
    bar.advance()
    assert written.getvalue() == "train:  50 %, step 50 of 100, 1:40:00 left; loss 3.100\n"


def test_quick_work_adds_nothing_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ten lines for each of a hundred measurements of a second."""
    written = write(monkeypatch, io.StringIO(), step=0.1)
    list(Console("train", shown=True).count("step", 40))
    assert written.getvalue() == ""


def test_a_log_keeps_what_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches characters that move a cursor, in a file."""
    written = write(monkeypatch, io.StringIO())
    console = Console("train", shown=True)
    console.status("reading digits")
    console.say("to runs/first")
    console.close()
    write_line("stopped")
    assert written.getvalue() == "train: reading digits\ntrain: to runs/first\nstopped\n"


@pytest.mark.parametrize(
    ("kind", "shown"), [(io.StringIO, None), (io.StringIO, False), (Terminal, False)]
)
def test_else_nothing_is_written(
    kind: type[io.StringIO], shown: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a log file full of counts that nobody asked for."""
    written = write(monkeypatch, kind(), step=60.0)
    for console in (Console("measure_leak", shown), SILENT):
        assert list(console.count("batch", 20)) == list(range(20))
        console.status("reading digits")
        console.say("to runs/first")
        console.close()
    assert written.getvalue() == ""


def test_width_of_a_terminal_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())  # has no file descriptor
    assert progress._width() == 80


class Broken(Terminal):
    """A pipe whose reader has gone."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stderr", [None, Broken()])
@pytest.mark.parametrize("shown", [None, True])
def test_work_goes_on_where_nobody_reads(
    stderr: io.StringIO | None, shown: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a training of days that ends with the terminal it was started from."""
    monkeypatch.setattr(sys, "stderr", stderr)
    console = Console("train", shown)
    console.status("reading digits")
    console.say("to runs/first")
    assert list(console.count("batch", 3)) == [0, 1, 2]
    write_line("stopped")
