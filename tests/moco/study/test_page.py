"""The page: whole, self-contained, and no stronger than the numbers."""

from pathlib import Path

import pytest
from markupsafe import Markup

from moco.comparison.test_report import Page
from moco.study.made_up import made_up_records
from shuffle_batchnorm.moco.comparison.summary import ResultsError
from shuffle_batchnorm.moco.study import page
from shuffle_batchnorm.moco.study.analysis import analyse
from shuffle_batchnorm.moco.study.cells import BASE, HELD_OUT
from shuffle_batchnorm.moco.study.page import render, write_page
from shuffle_batchnorm.moco.study.records import Records
from shuffle_batchnorm.moco.study.tables import grid

Runs = list[dict[str, object]]


def rendered(runs: Runs) -> Page:
    records = Records(runs, [{"cpus": 2, "processor": "a <CPU>"}])
    text = render(analyse(runs), records, {"law": Markup("<svg></svg>")}, command="study --x '<'")
    return Page(text)


def test_the_page_tells_rules_law_and_predictions() -> None:
    text = rendered(made_up_records()).text
    assert "MoCo was trained 333 times, in 69 settings" in text
    assert "n = 16: leak of local 0." in text
    assert "Law: of 6 families, power of the share predicts left-out cells best" in text
    for name in HELD_OUT:
        assert f"{name} was held out: power of the share predicts 0." in text
    assert "a <CPU>" in text
    assert "study --x '<'" in text


def test_the_page_has_the_leak_of_every_size_and_number_of_blocks() -> None:
    """Catches the table of another part of the study."""
    runs = made_up_records()
    _, rows = grid(analyse(runs).of("grid"))
    cells = "|".join(rendered(runs).cells)
    assert len(rows) == 5
    for row in rows:
        assert "|".join(row[1:]) in cells  # the size heads the row


def test_a_miss_is_called_one() -> None:
    runs = [r | {"leak": 0.9} if r["cell"] == HELD_OUT[0] else r for r in made_up_records()]
    text = rendered(runs).text
    assert "measured 0.900, which is outside" in text
    assert "which is inside" in text


def test_a_bad_fit_is_called_one() -> None:
    runs = [r | {"leak": r["leak"] + 0.3 * (r["B"] == 4)} for r in made_up_records()]
    assert "so it is not the whole truth" in rendered(runs).text


def test_the_page_tells_the_base_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the defaults of the day, with which the records were not made."""
    monkeypatch.setitem(BASE, "lr", 0.7654)
    assert "0.7654" in rendered(made_up_records()).text


def test_few_runs_are_no_law() -> None:
    text = rendered(made_up_records(seeds=(10,))).text
    assert "There are too few cells to fit, or all are of one n." in text
    assert "no measured number of blocks is known to leak less than 0.03" in text


def test_the_page_asks_nothing_of_the_network_and_lies_beside_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "save_figures", lambda *_: {})
    monkeypatch.setattr(page, "pictures", lambda *_: {})
    records = Records(made_up_records(), [])
    path = write_page(tmp_path, records, command="x")
    assert path == tmp_path / "study.html"
    parsed = Page(path.read_text())
    assert not [value for _, name, value in parsed.attributes if name in ("src", "href")]
    tables = (tmp_path / "tables.md").read_text()
    assert "Rules\n\n| n | leak of local |" in tables
    assert "\n| n64-B8 | 64 | 8 |" in tables


def test_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="records holds no record"):
        write_page(tmp_path, Records([], []), command="x")
