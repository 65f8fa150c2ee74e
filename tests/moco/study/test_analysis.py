"""What is fitted, what is predicted, and what is left out of both."""

from moco.study.made_up import made_up_records, true_leak
from shuffle_batchnorm.moco.study.analysis import analyse
from shuffle_batchnorm.moco.study.cells import HELD_OUT
from shuffle_batchnorm.moco.study.law import FAMILIES


def test_held_out_cells_are_predicted_and_not_fitted() -> None:
    """Catches a prediction of what the fit has seen."""
    records = made_up_records()
    plain = analyse(records)
    assert [one.cell for one in plain.predictions] == list(HELD_OUT)
    assert all(one.is_inside for one in plain.predictions)
    moved = analyse([r | {"leak": 0.9} if r["cell"] in HELD_OUT else r for r in records])
    assert list(moved.fits[0].values) == list(plain.fits[0].values)
    assert [(one.low, one.high) for one in moved.predictions] == [
        (one.low, one.high) for one in plain.predictions
    ]
    assert not any(one.is_inside for one in moved.predictions)


def test_a_late_family_does_not_predict_alone() -> None:
    """Catches a prediction that is called one although its family was chosen by the outcome."""
    late = FAMILIES[-1]
    records = made_up_records()
    for record in records:
        exact = float(late.leak(record["n"], record["B"], -1.9, 2.5, 27.0))
        record["leak"] = exact + 0.1 * (record["leak"] - true_leak(record["n"], record["B"]))
    found = analyse(records)
    assert found.fits[0].family == late
    assert late.is_late
    assert [(one.cell, one.family.is_late) for one in found.predictions] == [
        *((cell, True) for cell in HELD_OUT),
        *((cell, False) for cell in HELD_OUT),
    ]


def test_another_batch_size_is_predicted_and_not_fitted() -> None:
    records = made_up_records()
    plain = analyse(records)
    assert [one.cell for one in plain.beyond] == [f"n64-B{b}" for b in (1, 2, 3, 4, 6, 8)]
    moved = analyse([r | {"leak": 0.9} if r["n"] == 64 else r for r in records])
    assert list(moved.fits[0].values) == list(plain.fits[0].values)


def test_a_study_that_has_just_begun_has_cells_and_no_law() -> None:
    some = analyse(made_up_records(seeds=(10,)))
    assert not [*some.fits, *some.predictions, *some.beyond]
    assert len(some.of("grid")) == 28
    assert all(rule.cell is None for rule in some.rules)
