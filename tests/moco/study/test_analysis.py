"""What is fitted, what is predicted, and what is left out of both."""

from moco.study.made_up import made_up_records
from shuffle_batchnorm.moco.study.analysis import analyse
from shuffle_batchnorm.moco.study.cells import HELD_OUT


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
