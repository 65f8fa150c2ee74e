"""The study's tables."""

from moco.study.made_up import made_up_records
from shuffle_batchnorm.moco.study import tables
from shuffle_batchnorm.moco.study.analysis import analyse


def test_rows_fit_their_headers() -> None:
    """Catches a column too many, and an interval beside another parameter's name."""
    analysis = analyse(made_up_records())
    for header, rows in (
        (tables.CELLS, tables.cell_rows(analysis.cells.values())),
        (tables.FAMILIES, tables.family_rows(analysis.fits)),
        (tables.PREDICTIONS, tables.prediction_rows(analysis.predictions)),
        (tables.RULES, tables.rule_rows(analysis.rules)),
    ):
        assert rows
        assert {len(row) for row in rows} == {len(header)}
    best = analysis.fits[0]
    words = tables.family_rows(analysis.fits)[0][2]
    assert words.startswith(f"λ = {best.values[0]:.2f} [{best.low[0]:.3f}, {best.high[0]:.3f}], β")


def test_a_cell_in_words() -> None:
    records = made_up_records()
    for record in records:
        if record["cell"] == "n8-B2":
            record |= {"leak": 0.1 + 0.01 * (record["seed"] - 12), "knn": 0.98}
    [row] = [row for row in tables.cell_rows(analyse(records).cells.values()) if row[0] == "n8-B2"]
    assert row[:7] == ("n8-B2", "8", "2", "0.43", "5", "0.100 ± 0.007", "[0.080, 0.120]")


def test_the_grid_has_a_place_for_each_cell() -> None:
    """Catches rows and columns that are taken for each other, and a cell that is not measured."""
    records = [r for r in made_up_records() if r["cell"] in ("n8-B1", "n16-B1", "n16-B4")]
    for record in records:
        record["leak"] = record["n"] + record["B"] / 10
    header, rows = tables.grid(analyse(records).of("grid"))
    assert header == ("n", "B = 1", "B = 4")
    assert rows == [
        ("8", "8.100 ± 0.000", "–"),
        ("16", "16.100 ± 0.000", "16.400 ± 0.000"),
    ]


def test_a_size_without_a_rule_says_so() -> None:
    records = [r for r in made_up_records() if r["n"] == 8 and r["B"] < 3]
    [row] = tables.rule_rows(analyse(records).rules)
    assert row[2:] == ("none measured", "–", "–", "–")
