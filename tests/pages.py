"""The pages of the documentation: their code blocks, and a way to run them."""

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(.*)\n(?s:(.*?))^\1```$", re.MULTILINE)


class Block(NamedTuple):
    """What stands between two fences."""

    language: str
    title: str  # "", "excerpt", or the file that it is a part of
    code: str
    line: int  # of the page, the first one of the code


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        language, _, title = fence[2].partition(" ")
        title = title.removeprefix('title="').removesuffix('"')
        yield Block(language, title, fence[3], text[: fence.start()].count("\n") + 2)


def run_page(page: Path, given: dict[str, Any]) -> None:
    """Run a page's Python in one namespace; its excerpts too if their names are given."""
    names = {"__name__": page.stem, **given}
    for block in blocks(page):
        if block.language == "python" and block.title in {"", "excerpt" if given else ""}:
            run_block(block, page, names)


def run_block(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run a block in a namespace. An error has the page's own line numbers."""
    if ">>>" not in block.code:
        tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
        exec(compile(tree, str(page), "exec"), names)
        return
    parser, said = doctest.DocTestParser(), list[str]()
    examples = parser.get_doctest(block.code, {}, page.name, str(page), block.line - 1)
    examples.globs = names
    doctest.DocTestRunner(verbose=False).run(examples, out=said.append, clear_globs=False)
    assert not said, "".join(said)
