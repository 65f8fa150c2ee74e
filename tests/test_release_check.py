"""The checks of a release that need no environment of their own."""

import sys
from pathlib import Path

import pytest

from release_check import code_of, disagreements, run, run_doctests


def project(root: Path, version: str, cited: str, heading: str, released: str = "") -> Path:
    source = root / "src" / "shuffle_batchnorm"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text(f'__version__ = "{version}"\n')
    date = f"date-released: {released}\n" if released else ""
    (root / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited}\n{date}")
    (root / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{heading}\n\n## [0.0.1] – 2020-01-01\n")
    return root


@pytest.mark.parametrize(
    ("cited", "heading", "released", "said"),
    [
        ("1.2.0", "1.2.0] – 2026-01-31", "2026-01-31", []),
        ("1.1.0", "1.2.0] – 2026-01-31", "2026-01-31", ["CITATION.cff has version 1.1.0"]),
        (
            "1.2.0",
            "1.1.0] – 2026-01-31",
            "2026-01-31",
            ["first heading of CHANGELOG.md is of 1.1"],
        ),
        ("1.2.0", "1.2.0] – unreleased", "", ["has no date yet, but 'unreleased'"]),
        ("1.2.0", "1.2.0] – 2026-01-31", "", ["date-released must be 2026-01-31"]),
    ],
)
def test_what_is_left_to_do(
    tmp_path: Path, cited: str, heading: str, released: str, said: list[str]
) -> None:
    found = disagreements(project(tmp_path, "1.2.0", cited, heading, released))
    assert len(found) == len(said)
    for line, words in zip(found, said, strict=True):
        assert words in line


def test_readmes_code_is_found_and_excerpts_are_not(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    text = '```python\na = 1\n```\n\n```sh\nmake\n```\n\n```python title="excerpt"\nb\n```\n'
    page.write_text(text)
    assert code_of(page) == "a = 1\n"
    page.write_text("```sh\nmake\n```\n")
    with pytest.raises(SystemExit, match=r"README\.md has no Python block"):
        code_of(page)


def test_examples_are_run_and_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a module that what is built lacks, or its dependencies do, passed over."""
    package = tmp_path / "made_up_package"
    for folder in (package, package / "integrations", package / "moco"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (package / "good.py").write_text('"""\n>>> 1 + 1\n2\n"""\n')
    (package / "integrations" / "other.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not run_doctests("made_up_package")
    out = capsys.readouterr().out
    assert "1 examples, 0 failed; 1 modules left out\n  made_up_package.integrations.other" in out
    (package / "moco" / "trainer.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        run_doctests("made_up_package")
    assert not run_doctests("made_up_package", "moco")
    (package / "bad.py").write_text('"""\n>>> 1 + 1\n3\n"""\n')
    assert run_doctests("made_up_package", "moco")


def test_a_command_that_fails_ends_the_check(tmp_path: Path) -> None:
    run([sys.executable, "-c", "pass"], tmp_path)
    with pytest.raises(SystemExit, match="exit code 3: "):
        run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
