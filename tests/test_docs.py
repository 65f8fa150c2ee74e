"""README and the pages of docs/: code runs, commands exist, links lead somewhere."""

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conf
import pytest
import torch
from torch import nn

import shuffle_batchnorm
from integrations.torchvision_stub import torchvision_for_import
from pages import DOCS, FENCE, ROOT, blocks, run_page
from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.moco.cli import _parse as parse
from shuffle_batchnorm.moco.config import UserError

SITE = sorted(DOCS.rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _leak() -> dict[str, Any]:
    """A MoCo whose encoders see 32 groups, as the page's does."""
    images = torch.randn(600, 4)
    layers = nn.Linear(4, 8), ShuffleBatchNorm(8, mode="regroup", groups=32)
    encoder = nn.Sequential(*layers)

    class MoCo:
        encoder_q = encoder_k = encoder
        queue = torch.randn(64, 8)

    return {"moco": MoCo, "encoder": encoder, "images": images, "augment": None}


def _lightly() -> dict[str, Any]:
    """An encoder and a head."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    head = nn.Linear(4 * 4 * 4, 8)
    return {
        "x": torch.randn(16, 3, 6, 6),
        "backbone": backbone,
        "backbone_momentum": backbone,
        "projection_head_momentum": head,
        "groups": 8,
        "deactivate_requires_grad": lambda module: module.requires_grad_(False),
    }


def _timm() -> dict[str, Any]:
    """Nothing, but timm can be imported where there is no torchvision."""
    with torchvision_for_import():
        pytest.importorskip("timm")
    return {}


# The names that a page takes for granted. With them its excerpts run, too.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/leak.md": _leak,
    "docs/integrations/lightly.md": _lightly,
    "docs/integrations/timm.md": _timm,
}
# Pages that a test of their own runs, and looks at what comes out.
ELSEWHERE = {"docs/audit.md": "probe/test_audit_recipes.py"}


@every_page
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that a change of the library broke."""
    name = str(page.relative_to(ROOT))
    if name in ELSEWHERE:
        assert "run_block(" in (ROOT / "tests" / ELSEWHERE[name]).read_text(encoding="utf-8")
        return
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(page, GIVEN.get(name, dict)())


def test_a_block_that_fails_is_seen(tmp_path: Path) -> None:
    """Catches pages whose code is not run; an excerpt is, if its names are given."""
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run_page(page, {})
    page.write_text('```python title="excerpt"\nassert given == 2\n```\n')
    run_page(page, {})
    run_page(page, {"given": 2})
    with pytest.raises(AssertionError):
        run_page(page, {"given": 1})


@every_page
def test_blocks_say_what_they_are(page: Path) -> None:
    """Catches a block that no test looks at, and a part of a file that the file has no more."""
    for block in blocks(page):
        assert block.language in {"python", "sh", "console", "text", "json", "bibtex", "diff",
                                  "{eval-rst}"}, (block.line, block.language)  # fmt: skip
        if block.title not in {"", "excerpt"}:
            file = (ROOT / block.title).read_text(encoding="utf-8")
            assert _unindented(block.code) in _unindented(file), block.line
        if block.language == "python" and ">>>" not in block.code:
            ast.parse(block.code)
    fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(page)))


def _unindented(code: str) -> str:
    """The lines of code without indentation, and without blank ones."""
    return "\n".join(filter(None, map(str.strip, code.splitlines()))) + "\n"


def _commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page's shell blocks, each as its words."""
    for block in blocks(page):
        if block.language not in {"sh", "console"}:
            continue
        text = block.code.replace("\\\n", " ")
        lines = text.splitlines()
        if block.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            command_line = re.sub(r" \d?>+ ?\S+", "", line)  # without where its output goes
            lexer = shlex.shlex(command_line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set(";&|"):
                    if command:
                        yield command
                    command = []
                elif command or not re.match(r"[A-Z_]+=", word):  # a variable of the environment
                    command.append(word)


def _check(command: list[str]) -> None:
    """Raise if a command names something that doesn't exist."""
    program, *rest = command
    program = Path(program).name
    for word in rest:
        if word.startswith(("benchmarks/", "docs/", "examples/", "src/", "tests/")):
            assert (ROOT / word.partition("::")[0]).exists(), command
    if program == "make":
        for word in rest:
            name, assigns, _ = word.partition("=")
            pattern = rf"^{name} \?=" if assigns else rf"^{name}:"
            assert re.search(pattern, MAKEFILE, re.MULTILINE), command
    elif program == "shuffle-batchnorm":
        parse(rest)
    elif program in {"python", "python3", "torchrun", "srun"}:
        if "-m" in rest:
            module, *rest = rest[rest.index("-m") + 1 :]
            assert module in {"shuffle_batchnorm", "pytest", "venv", "http.server"}, command
            if module == "shuffle_batchnorm":
                parse(rest)
            return
        files = [word for word in rest if word.endswith(".py")]
        if files:
            assert (ROOT / files[0]).exists(), command
            folder = (ROOT / files[0]).parent
            source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
            for word in rest[rest.index(files[0]) + 1 :]:
                flag = word.partition("=")[0]
                assert f'"{flag}"' in source or not flag.startswith("--"), (command, flag)
    else:
        others = (
            "apt",
            "apt-get",
            "bash",
            "cat",
            "cd",
            "export",
            "git",
            "patch",
            "pip",
            "pytest",
            "sbatch",
        )
        assert program in others, command


@every_page
def test_commands_exist(page: Path) -> None:
    """Catches a target, a file, a command or a flag that was renamed."""
    for command in _commands(page):
        _check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make test NO=1",
        "python examples/nothing.py",
        "python main.py --nothing",
        "shuffle-batchnorm train --nothing 3",
        "torchrun --nproc-per-node 2 -m shuffle_batchnorm trian",
        "pytest tests/nothing",
        "sbatch examples/nothing.sh",
        "shuffle-batchnrom train",
    ],
)
def test_commands_that_do_not_exist(command: str) -> None:
    """Catches a check that lets everything through."""
    with pytest.raises((AssertionError, UserError)):
        _check(command.split())


def _anchors(page: Path) -> set[str]:
    """What a link into a page can name, spelt as code-hosting sites and the site do."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    """Catches a dead link or anchor, also in files that the site doesn't have."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there), target


def test_navigation_has_every_page_once() -> None:
    """Catches a page that nobody finds."""
    listed = [name for part in conf.NAVIGATION.values() for names in part.values()
              for name in names.values()]  # fmt: skip
    found = {str(page.relative_to(DOCS).with_suffix("")) for page in SITE} - {"README"}
    assert sorted(listed) == sorted(found)


def test_every_public_name_is_on_one_api_page() -> None:
    """Catches a name without documentation, and one that is gone."""
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE)
    public = [f"shuffle_batchnorm.{name}" for name in shuffle_batchnorm.__all__]
    for path in (ROOT / "src" / "shuffle_batchnorm" / "integrations").glob("[!_]*.py"):
        public += [
            f"shuffle_batchnorm.integrations.{path.stem}.{node.name}"
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        ]
    # Lightning makes this one itself.
    public.remove("shuffle_batchnorm.integrations.lightning.PluginWatch")
    assert sorted(documented) == sorted(public)


def test_links_to_files_outside_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a link of the site to a file that only a checkout has."""
    text = (
        "[code](../src/shuffle_batchnorm/norm/mixing.py#L3), "
        "[`results/gpu`](../benchmarks/results/gpu), [rules](../CONTRIBUTING.md), "
        "[a page](leak.md#use), ![a picture](law.png), [dead](../no.py)"
    )
    found = conf.outside_links(text, DOCS / "law.md", DOCS)
    assert found == (
        "[code](../src/shuffle_batchnorm/norm/mixing.py#L3), `benchmarks/results/gpu`, "
        "rules (`CONTRIBUTING.md`), [a page](leak.md#use), ![a picture](law.png), [dead](../no.py)"
    )
    monkeypatch.setattr(conf, "REPOSITORY", "https://host/us/blob/main")
    found = conf.outside_links(text, DOCS / "law.md", DOCS)
    assert found == (
        "[code](https://host/us/blob/main/src/shuffle_batchnorm/norm/mixing.py#L3), "
        "[`results/gpu`](https://host/us/blob/main/benchmarks/results/gpu), "
        "[rules](https://host/us/blob/main/CONTRIBUTING.md), "
        "[a page](leak.md#use), ![a picture](law.png), [dead](../no.py)"
    )
