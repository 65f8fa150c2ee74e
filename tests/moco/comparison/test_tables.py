"""The tables: what stands in a cell, and what is said below."""

from moco.comparison.made_up import diverged_record, made_up_record, made_up_records
from shuffle_batchnorm.moco.comparison.tables import (
    IN_BATCH,
    INTERVALS,
    LEFT_OUT,
    markdown_table,
    notes,
    run_line,
    run_row,
    written,
)


def test_minus_zero_has_no_sign() -> None:
    assert (written(-0.0004), written(-0.0006), written(0.0)) == ("0.000", "−0.001", "0.000")


def test_markdown_has_a_row_per_bn_with_mean_error_and_interval() -> None:
    runs = [made_up_record("local", k, leak=v, knn=v) for k, v in enumerate((0.1, 0.2, 0.3))]
    lines = markdown_table(runs).splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert set(lines[1]) == set("| -")
    assert lines[2].startswith("| `local` | 0.200 ± 0.058 | [−0.048, 0.448] | 0.200 ± 0.058 |")
    assert "Mean over 3 seeds ± standard error." in lines[-1]


def test_a_bn_all_of_whose_runs_diverged_has_no_numbers() -> None:
    """A leak of 0 would read as a cure."""
    line = markdown_table([diverged_record("swap", 0)]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["`swap` (1 of 1 diverged)", "diverged", "–", *["diverged"] * 3, "–"]


def test_a_leak_that_was_not_measured_is_a_dash() -> None:
    line = markdown_table([made_up_record(leak=None)]).splitlines()[2]
    assert line.replace(" ", "").startswith("|`local`|–|–|0.9")


def test_columns_are_aligned() -> None:
    records = made_up_records(diverged={("swap", 1)})
    lines = markdown_table(records).split("\n\n")[0].splitlines()
    assert len(lines) == 2 + 5
    assert len({line.index("]") for line in lines[2:]}) == 1
    assert len(set(map(len, lines))) == 1
    assert "`swap` (1 of 3 diverged)" in lines[4]
    assert ["**0.9" in line for line in lines[2:]] == [False, True, False, True, True]


def test_notes_say_what_the_numbers_are() -> None:
    """Catches a note of what isn't there, or of seeds that are none."""
    plain = notes(made_up_records(("local",), range(1)))
    assert plain == ["One seed each.", INTERVALS]
    mixed = notes(made_up_records(("local", "swap"), diverged={("swap", 1)}))
    assert mixed[:2] == ["Mean over 2 to 3 seeds ± standard error.", INTERVALS]
    assert mixed[2].startswith("kNN minus that of local, paired by seed: swap −0.0")
    assert mixed[3:] == [LEFT_OUT]
    assert notes(made_up_records())[2].startswith("kNN in bold: the highest mean")


def test_a_linear_probe_has_a_column_where_there_is_one() -> None:
    """Catches a column of dashes where nobody asked for it, and a bold cell that moved with it."""
    plain = made_up_records(("local", "regroup"))
    assert "linear probe" not in markdown_table(plain)
    probed = [run | {"linear": 0.8 + 0.01 * run["seed"]} for run in plain]
    header, _, *rows = markdown_table(probed).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in (header, *rows[:2])]
    assert [line[5] for line in cells] == ["linear probe", "0.810 ± 0.006", "0.810 ± 0.006"]
    assert "linear probe minus that of local, paired by seed: regroup +0.0000" in rows[-1]


def test_a_note_tells_other_negatives_where_there_are_two_kinds() -> None:
    assert IN_BATCH in notes(made_up_records(("sync", "simclr")))
    assert IN_BATCH not in notes(made_up_records(("simclr",)))


def test_line_and_row_of_a_run() -> None:
    run = made_up_record(leak=0.25, leak_interval=[0.2, 0.3], knn=0.97)
    said = "leak 0.250 [0.200, 0.300], kNN 0.970, pretext accuracy 0.400, 10.0 s"
    assert run_line(run) == said
    assert run_row(run)[:4] == ("local", "0", "0.250", "[0.200, 0.300]")
    assert run_line(diverged_record()) == "diverged, 10.0 s"
    row = run_row(diverged_record())
    assert row[2] == row[6] == row[8] == "diverged"
