"""The command ``shuffle-batchnorm``: train, compare, probe and more; see `commands.py`."""

import contextlib
import io
import itertools
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import shuffle_batchnorm
from shuffle_batchnorm.probe.progress import write_line

from .config import UserError
from .ranks.launch import is_first, under_torchrun
from .ranks.spawn import RankError, Stopped, leave

PROGRAM = "shuffle-batchnorm"
FAILURE, USER_ERROR = 1, 2
# What --help says where the flag parser, tyro, is not installed.
USAGE = f"""\
usage: {PROGRAM} [--help] [--version] COMMAND [OPTIONS]

  train      train MoCo, or go on with --resume; measure kNN and the leak at the end
  compare    train with several --bn and seeds, in turn, and write one report
  evaluate   tell how good the features in a checkpoint are
  probe      tell how much the keys of a checkpoint leak
  audit      tell through which modules of a checkpoint samples see each other
  study      train many small runs: how the leak depends on what
"""
# Packages of the extra `train`; if another one is missing, something else is wrong.
EXTRA = {"jinja2", "kornia", "matplotlib", "numpy", "PIL", "scipy", "sklearn", "tyro"}


def run() -> NoReturn:
    """Be the command: end this process with the exit code of `main`."""
    code = main()
    if under_torchrun():
        leave(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; by default, what this process was given.

    Returns:
        The exit code: 0; 2 for what the user can fix, which the last line on stderr tells; 1 if a
        rank died; 130 after SIGINT and 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"{PROGRAM} {shuffle_batchnorm.__version__}")
        return 0
    try:
        act = _parse(words)
        act()
    except UserError as error:
        return _refuse(str(error))
    except Stopped as stopped:
        return _refuse(str(stopped), 128 + stopped.signum)
    except RankError as error:
        return _refuse(str(error), FAILURE)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        # True of every install: no package index is asked for this library.
        need = (
            f'{PROGRAM}: this needs {package}, one of the packages of the extra "train"; in the '
            'folder of the source code: pip install ".[train]"'
        )
        if {"-h", "--help"}.isdisjoint(words):
            return _refuse(need)
        print(f"{USAGE}\n{need}")
    except KeyboardInterrupt:
        return _refuse("stopped", 128 + signal.SIGINT)
    return 0


def _parse(arguments: list[str]) -> Callable[[], None]:
    """Return what to do.

    Raises:
        UserError: what the flag parser says.
    """
    import tyro

    from .commands import Command

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            wanted: Any = tyro.cli(
                Command,
                prog=PROGRAM,
                description="Train MoCo without the leak, and measure the leak. "
                "--version prints the version.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as end:
        if end.code:
            raise UserError(_one_line(said.getvalue())) from None
        return lambda: None  # it has printed the help
    act: Callable[[], None] = wanted.act
    return act


def _refuse(message: str, code: int = USER_ERROR) -> int:
    """Print in one line why there is no result, once per machine; return the exit code."""
    if is_first():
        write_line(" ".join(message.split()))
    return code


def _one_line(panel: str) -> str:
    r"""Return the message in the frame that tyro draws around it.

    Example:
        >>> _one_line("╭─ Invalid choice ─╮\n│ no x │\n│ ──── │\n│ see --help │\n╰────╯")
        'shuffle-batchnorm: invalid choice: no x; see --help'
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", panel).translate(dict.fromkeys(map(ord, "╭╮╰╯│─"), " "))
    # Without the frame, or where there is none, a rule is a line of dashes or an empty one.
    lines = [re.sub("^-+$", "", line.strip()) for line in text.splitlines()]
    title, *rest = itertools.dropwhile(lambda line: not line, lines)
    body_on = itertools.dropwhile(lambda line: not line, rest)
    body = " ".join(itertools.takewhile(bool, body_on)).rstrip(".")
    message = body if body.lower().startswith(title.lower()) else f"{title.lower()}: {body}"
    return f"{PROGRAM}: {message[:1].lower()}{message[1:]}; see --help"
