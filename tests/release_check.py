"""Whether this can be released: built, installed where nothing else is, and tried there.

``make release-check`` runs it. What it has checked is in ``dist/`` then.

python tests/release_check.py [ARGUMENTS OF PIP ...]
"""

import doctest
import importlib
import importlib.metadata
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "shuffle_batchnorm"
DIST = ROOT / "dist"
COMPARE = (
    "compare", "--bn", "local,regroup", "--epochs", "1", "--ranks", "1", "--groups", "16",
    "--device", "cpu", "--output", "runs",
)  # fmt: skip


def main(pip: Sequence[str]) -> int:
    left = disagreements(ROOT)
    build()
    [wheel], [sdist] = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    check_metadata(wheel)
    code = "\n\n".join(map(code_of, (ROOT / "README.md", ROOT / "docs" / "quick_start.md")))
    for file in (wheel, sdist):
        with tempfile.TemporaryDirectory() as folder:
            try_install(file, Path(folder), pip, code, extra=file == wheel)
    for line in left:
        print(f"left to do: {line}")
    return bool(left)


def disagreements(root: Path) -> list[str]:
    """What version, changelog and CITATION.cff do not agree on, or a release lacks."""

    def first(pattern: str, name: str) -> str:
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else "nothing"

    version = first(r'^__version__ = "(.*)"', f"src/{PACKAGE}/__init__.py")
    cited = first(r"^version: (.*)", "CITATION.cff")
    released = first(r"^date-released: (.*)", "CITATION.cff")
    heading = first(r"^## \[(.*)", "CHANGELOG.md")
    noted, _, date = heading.partition("] – ")
    said = []
    if cited != version:
        said.append(f"CITATION.cff has version {cited}, the package {version}")
    if noted != version:
        said.append(f"the first heading of CHANGELOG.md is of {noted}, the package is {version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        said.append(f"CHANGELOG.md: {version} has no date yet, but {date!r}")
    elif released != date:
        said.append(f"CITATION.cff: date-released must be {date}, as in CHANGELOG.md")
    return said


def build() -> None:
    """Leave a source distribution and a wheel in ``dist/``, and nothing else."""
    shutil.rmtree(DIST, ignore_errors=True)
    run([sys.executable, "-m", "hatchling", "build"], ROOT)


def check_metadata(wheel: Path) -> None:
    """Refuse what a package index would refuse."""
    from packaging.metadata import Metadata

    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(name), validate=True)
    print(f"metadata of {metadata.name} {metadata.version} is valid")


def code_of(page: Path) -> str:
    """The Python of a page that runs; an excerpt is marked as one."""
    from pages import blocks  # not where an installed package is tried, which has no such module

    code = [block.code for block in blocks(page) if (block.language, block.title) == ("python", "")]
    if not code:
        raise SystemExit(f"{page.name} has no Python block that runs")
    return "\n\n".join(code)


def try_install(file: Path, folder: Path, pip: Sequence[str], code: str, *, extra: bool) -> None:
    """Install a file into an empty environment and run the pages' code and the docstrings' there.

    With the extra, the command line too.
    """
    print(f"\n{file.name}: into an empty environment", flush=True)
    run([sys.executable, "-m", "venv", "env"], folder)
    python = str(folder / "env" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *pip]
    run([*install, str(file)], folder)
    (folder / "pages.py").write_text(code, encoding="utf-8")
    # -I: neither this folder nor a variable makes the source tree importable.
    run([python, "-I", "pages.py"], folder)
    print("the code of README and of the quick start runs", flush=True)
    doctests = [python, "-I", str(Path(__file__).resolve()), "--doctest", PACKAGE]
    run([*doctests, "moco"], folder)
    if extra:
        run([*install, f"{PACKAGE}[train] @ {file.as_uri()}"], folder)
        run(doctests, folder)
        run([python, "-I", "-m", PACKAGE, *COMPARE], folder)
        assert (folder / "runs" / "report.html").is_file()


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command; its failure is this check's."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"failed, exit code {done.returncode}: {' '.join(command)}")


def run_doctests(name: str = PACKAGE, *rooms: str) -> int:
    """Run the examples in an installed package's docstrings; return whether one failed.

    Rooms that are named are left out, and modules that need a package of no extra of ours, which
    are named.
    """
    package = importlib.import_module(name)
    print(f"docstrings of {package.__file__}, torch {importlib.metadata.version('torch')}")
    left_out, failed, attempted = [], 0, 0
    for found in pkgutil.walk_packages(package.__path__, f"{name}."):
        if found.name.endswith("__main__") or found.name.split(".")[1] in rooms:
            continue
        try:
            module = importlib.import_module(found.name)
        except ImportError as error:
            if not found.name.startswith((f"{name}.integrations.", f"{name}.kernels.triton_")):
                raise
            left_out.append(f"{found.name}: {error}")
            continue
        result = doctest.testmod(module)
        failed, attempted = failed + result.failed, attempted + result.attempted
    print(
        f"{attempted} examples, {failed} failed; {len(left_out)} modules left out",
        *left_out,
        sep="\n  ",
    )
    return bool(failed) or not attempted


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    is_inside = sys.argv[1:2] == ["--doctest"]
    sys.exit(run_doctests(*sys.argv[2:]) if is_inside else main(sys.argv[1:]))
