"""The house: imports only go down, files are small, every module has a test of its stem."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = "shuffle_batchnorm"
SRC = TESTS.parent / "src" / PACKAGE
# Each room, and those below it.
ROOMS = {
    "kernels": set(),
    "comm": set(),
    "norm": {"kernels", "comm"},
    "shuffle": {"kernels", "comm"},
    "probe": {"kernels", "comm", "norm", "shuffle"},
    "integrations": {"kernels", "comm", "norm", "shuffle", "probe"},
    # The package itself has the version; it imports nothing of moco.
    "moco": {"kernels", "comm", "norm", "shuffle", "probe", "__init__"},
}
# Their tests have other names, or there is nothing in them to test.
TESTED_ELSEWHERE = {
    "triton_kernels": "kernels/test_triton_launch.py",
    "triton_messages": "kernels/test_triton_ranks.py",
}
MODULES = {
    ".".join((PACKAGE, *path.relative_to(SRC).with_suffix("").parts)): path
    for path in sorted(SRC.rglob("*.py"))
}


def _imports(name: str, path: Path) -> Iterator[str]:
    """The modules of ours that a module imports, at the top or inside a function."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" for alias in node.names]
        for target in found:
            parts = target.split(".")
            while parts and ".".join(parts) not in MODULES:
                init = ".".join([*parts, "__init__"])
                if init in MODULES:
                    parts = init.split(".")
                    break
                parts.pop()
            if parts:
                yield ".".join(parts)


def _room(module: str) -> str:
    return module.split(".")[1]


def test_the_rooms_are_those_of_the_plan() -> None:
    """Catches a new folder that no rule knows, and a module beside the rooms."""
    found = {path.name for path in SRC.iterdir() if path.name != "__pycache__"}
    assert found == {"__init__.py", "__main__.py", "py.typed", *ROOMS}


@pytest.mark.parametrize("module", [name for name in MODULES if _room(name) in ROOMS])
def test_imports_only_go_down(module: str) -> None:
    """Catches an arrow upward or sideways between rooms."""
    room = _room(module)
    for target in _imports(module, MODULES[module]):
        assert _room(target) in {room, *ROOMS[room]}, f"{module} imports {target}"


def test_imports_have_no_circles() -> None:
    """Catches two modules of a room that need each other."""
    graph = {name: set(_imports(name, path)) - {name} for name, path in MODULES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_files_are_small(module: str) -> None:
    """Catches a file that nobody holds in the head, and logic in an `__init__`."""
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= (40 if module.endswith("__init__") else 350)


@pytest.mark.parametrize("module", [name for name in MODULES if _room(name) in ROOMS])
def test_every_module_has_a_test_of_its_stem(module: str) -> None:
    """Catches logic that nobody tests where its reader looks for the test."""
    *folders, stem = module.split(".")[1:]
    if stem == "__init__":
        return
    room = TESTS.joinpath(*folders)
    other = TESTED_ELSEWHERE.get(stem)
    assert list(room.glob(f"test_{stem}*.py")) or (other and (TESTS / other).exists())
