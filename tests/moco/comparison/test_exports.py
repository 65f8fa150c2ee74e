"""What other programs and papers take from the results."""

import csv
import io
import re

import pytest

from moco.comparison.made_up import made_up_record, made_up_records
from shuffle_batchnorm.moco.comparison.exports import (
    COLUMNS,
    bibtex,
    csv_table,
    latex_cell,
    latex_table,
    latex_text,
)


def test_csv_has_a_row_per_run_with_all_digits() -> None:
    runs = made_up_records()
    rows = list(csv.DictReader(io.StringIO(csv_table(runs))))
    assert [(row["bn"], int(row["seed"])) for row in rows] == [(r["bn"], r["seed"]) for r in runs]
    assert [float(row["leak [fraction]"]) for row in rows] == [run["leak"] for run in runs]
    assert float(rows[0]["leak_high [fraction]"]) == runs[0]["leak_interval"][1]
    assert len(rows[0]) == len(COLUMNS)


def test_csv_leaves_open_what_is_unknown() -> None:
    runs = [
        {"bn": "local", "seed": 0, "leak": None, "leak_interval": None},
        made_up_record(commits=["a+", None], begun="2026-01-02T03:04:05+00:00"),
    ]
    old, new = csv.DictReader(io.StringIO(csv_table(runs)))
    assert set(old.values()) == {"local", "0", ""}
    assert (new["commits"], new["begun [UTC]"]) == ("a+ unknown", "2026-01-02T03:04:05+00:00")


def test_latex_has_the_numbers_of_the_table() -> None:
    knn = {"local": 0.9, "swap_1": 0.970, "regroup": 0.971}
    runs = [made_up_record(bn, k, knn=v + k / 1000) for bn, v in knn.items() for k in range(3)]
    for run in runs[:3]:
        run["leak"] = -0.25
    text = latex_table(runs, "digits")
    rows = dict(re.findall(r"^ {4}([\w\\-]+) & (.*) \\\\$", text, flags=re.MULTILINE))
    assert list(rows) == ["bn", "local", r"swap\_1", "regroup"]
    assert rows["bn"] == r"leak & 95 \% interval & kNN & pretext accuracy"
    assert rows["local"].startswith(r"$-0.250 \pm 0.000$ & $[-0.250, -0.250]$ & $0.901 \pm 0.001$")
    assert r"& $\mathbf{0.972} \pm 0.001$ &" in rows["regroup"]
    assert r"\caption{The leak of MoCo's key encoder on digits. Mean over 3 seeds $\pm$" in text
    assert "paired by seed" not in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("–", "--"),
        ("diverged", "diverged"),
        ("−0.001 ± 0.003", r"$-0.001 \pm 0.003$"),
        ("12.5", "$12.5$"),
        ("a_b (1 of 2 diverged)", r"a\_b (1 of 2 diverged)"),
    ],
)
def test_cells(cell: str, expected: str) -> None:
    assert latex_cell(cell) == expected


def test_text_holds_no_command() -> None:
    assert latex_text(r"\x{50%}&$#^~_") == (
        r"\textbackslash{}x\{50\%\}\&\$\#\textasciicircum{}\textasciitilde{}\_"
    )


def test_bibtex_cites_the_code_that_was_run() -> None:
    run = made_up_record(
        versions={"shuffle_batchnorm": ["0.1.0+gAB"]},
        commits=["8fd9b07c57ab59f3d36e3dd5140fa23b14776dbf+", None],
        begun="2026-11-28T20:49:44+00:00",
    )
    text = bibtex([run, run | {"commits": []}])
    assert "note   = {Version 0.1.0+gAB, commit 8fd9b07c57ab with uncommitted changes}," in text
    assert "year   = {2026}," in text
    assert r"author = {{shuffle\_batchnorm contributors}}," in text
    assert "eprint        = {1911.05722}," in text
    assert text.count("@") == 2
    assert text.count("{") == text.count("}")


def test_bibtex_of_unknown_code_names_none() -> None:
    text = bibtex([made_up_record()]).partition("@inproceedings")[0]
    assert "note" not in text
    assert "year" not in text
