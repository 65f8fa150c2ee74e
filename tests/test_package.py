"""The package as a whole: what importing it costs, and what is built and shown of it."""

import email.message
import email.parser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import hatchling.build
import pytest

import shuffle_batchnorm

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
NAME = f"shuffle_batchnorm-{shuffle_batchnorm.__version__}"


def run(code: str, *arguments: str, path: Path, folder: Path = ROOT) -> str:
    """What a new process prints that finds the package in `path`."""
    done = subprocess.run(
        [sys.executable, code, *arguments],
        env=os.environ | {"PYTHONPATH": str(path)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_importing_needs_torch_alone_and_not_the_compiler() -> None:
    """Catches an import that takes seconds in every process, and a dependency of the trainer."""
    code = """
import sys
import torch
before = set(sys.modules)
import shuffle_batchnorm
new = {name.partition('.')[0] for name in set(sys.modules) - before}
heavy = {'kornia', 'matplotlib', 'sklearn', 'scipy', 'tqdm', 'tyro', 'jinja2', 'PIL', 'triton'}
print(sorted(new & heavy), 'torch._dynamo' in sys.modules and 'torch._dynamo' not in before)
"""
    assert run("-c", code, path=SRC) == "[] False"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is built: ``sdist/``, and ``wheel/`` from it, as an installer has it."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        with tarfile.open(folder / hatchling.build.build_sdist(str(folder))) as archive:
            archive.extractall(folder, filter="data")
        (folder / NAME).rename(folder / "sdist")
        patch.chdir(folder / "sdist")
        with zipfile.ZipFile(folder / hatchling.build.build_wheel(str(folder))) as archive:
            archive.extractall(folder / "wheel")
    return folder


@pytest.fixture(scope="module")
def metadata(built: Path) -> email.message.Message:
    """What a package index is told."""
    text = (built / "wheel" / f"{NAME}.dist-info" / "METADATA").read_text(encoding="utf-8")
    return email.parser.Parser().parsestr(text)


def files(folder: Path) -> set[str]:
    """Every file in a folder, but for what Python has compiled."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)) for p in paths if "__pycache__" not in p.parts}


def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    """Catches a template, or the mark that it has types, that only a checkout has."""
    found = {name for name in files(built / "wheel") if not name.startswith(f"{NAME}.dist-info/")}
    assert found == files(SRC)
    assert {"shuffle_batchnorm/py.typed", "shuffle_batchnorm/moco/cli.py"} < found
    assert "shuffle_batchnorm/moco/comparison/report.html.jinja" in found


def test_the_source_distribution_is_lean(built: Path) -> None:
    """Catches runs, measurements and pictures that every download would carry."""
    found = files(built / "sdist")
    assert {name for name in found if "/" not in name} == {
        *(
            "CHANGELOG.md",
            "CITATION.cff",
            "CONTRIBUTING.md",
            "LICENSE",
            "README.md",
            "SECURITY.md",
            "PKG-INFO",
            "pyproject.toml",
            ".gitignore",
        )
    }
    folders = {name.partition("/")[0] for name in found if "/" in name}
    assert folders == {"src", "tests", "docs", "examples", "benchmarks"}
    assert {Path(name).suffix for name in found if name.startswith("docs/")} == {".md"}
    assert {name for name in found if name.startswith("benchmarks/")} == {"benchmarks/meters.py"}
    assert sum((built / "sdist" / name).stat().st_size for name in found) < 3 * 2**20


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_version_of_each_kind_of_install(where: str, built: Path, tmp_path: Path) -> None:
    """Catches a version that is looked up where nothing is installed, or somewhere else."""
    path = SRC if where == "checkout" else built / "wheel"
    said = run("-m", "shuffle_batchnorm", "--version", path=path, folder=tmp_path)
    assert said == f"shuffle-batchnorm {shuffle_batchnorm.__version__}"


def test_metadata_has_the_version_of_the_source(metadata: email.message.Message) -> None:
    assert metadata["Version"] == shuffle_batchnorm.__version__
    assert metadata["License-Expression"] == "MIT"


def test_torch_has_no_upper_bound(metadata: email.message.Message) -> None:
    """Catches a bound that takes a user's newer torch away; and a second dependency."""
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [re.fullmatch(r"torch>=2\.\d+", line) is not None for line in needed] == [True], needed


def test_an_index_shows_no_link_to_a_file(metadata: email.message.Message) -> None:
    """Catches a picture or link of README that is broken where there are no files beside it."""
    shown = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert re.findall(r"\]\((?!https://)[^)]*\)|<img", shown) == []
    assert "[He et al. 2019](https://arxiv.org/abs/1911.05722)" in shown
    assert "`measure_leak` [docs/leak.md] measures any" in shown
    # All else is as in README, the tables and code as well.
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in lines if line and "](" not in line and line not in shown]
    assert [line for line in missing if not re.match(r"that keys lose|\*MoCo", line)] == []
