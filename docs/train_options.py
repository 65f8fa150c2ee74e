"""Write the options of `train` into docs/trainer.md, between two marks.

python docs/train_options.py

They are read from the source of the configuration: the flag, its default, the text below the field.
"""

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from shuffle_batchnorm.moco import config
from shuffle_batchnorm.moco.config import Config, flag

PAGE = Path(__file__).with_name("trainer.md")
BEGIN, END = "<!-- options of train: docs/train_options.py -->", "<!-- end of options -->"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}")


def tables() -> str:
    """Return a table for each part of the configuration."""
    texts = dict(_texts())
    lines: list[str] = []
    for part in get_type_hints(Config).values():
        rows = [
            f"| {_flags(name, hint)} | {_shown(getattr(part(), name))} | {texts[name]} |"
            for name, hint in get_type_hints(part).items()
        ]
        title = (part.__doc__ or "").rstrip(".")
        lines += [f"**{title}**", "", "| option | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _texts() -> Iterator[tuple[str, str]]:
    """Yield the name of each field, and the text below it."""
    for node in ast.parse(inspect.getsource(config)).body:
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                text = ast.literal_eval(below.value)
                yield field.target.id, " ".join(text.split()).rstrip(".")


def _flags(name: str, hint: Any) -> str:
    if hint is bool:
        return f"`{flag(name)}`, `--no-{flag(name)[2:]}`"
    return f"`{flag(name)}`{_choices(hint)}"


def _choices(hint: Any) -> str:
    return " " + ", ".join(get_args(hint)) if get_origin(hint) is Literal else ""


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "on", False: "off"}[value]
    return f"`{value}`"


if __name__ == "__main__":
    main()
