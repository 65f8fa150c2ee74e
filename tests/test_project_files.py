"""The files around the code: what to cite, and the forms of an issue."""

import re
from pathlib import Path
from typing import Any

import pytest

import shuffle_batchnorm
from release_check import ROOT, disagreements
from shuffle_batchnorm.moco.comparison.exports import AUTHOR, TITLE

yaml = pytest.importorskip("yaml")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# Kind of a part: what a form must say of it.
PARTS = {"markdown": {"value"}, "checkboxes": {"label", "options"}}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_what_to_cite_is_this_version() -> None:
    """Catches a release that is cited as the one before; BibTeX of a report says the same."""
    cited = read(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == shuffle_batchnorm.__version__
    assert cited["title"] == TITLE
    assert cited["authors"] == [{"name": AUTHOR}]
    assert [line for line in disagreements(ROOT) if "has no date yet" not in line] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one(path: Path) -> None:
    """Catches a form that the site would not show, without a word to anybody."""
    form = read(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form.keys() == {"name", "description", "labels", "body"}
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) > 0
    for part in form["body"]:
        assert part["type"] in {"markdown", "textarea", "input", "checkboxes"}
        assert part["attributes"].keys() >= PARTS.get(part["type"], {"label"})
        assert part.get("validations", {}).keys() <= {"required"}
    text = path.read_text(encoding="utf-8")
    for page in re.findall(r"docs/[\w/]+\.md", text):
        assert (ROOT / page).exists(), page


def test_a_bug_comes_with_what_is_needed_to_find_it() -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml")
    needed = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert {"what", "code", "ranks", "mode", "versions"} <= needed
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert "python -m torch.utils.collect_env" in text
