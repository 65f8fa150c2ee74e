"""The arithmetic of a comparison, against numbers worked out by hand and by simulation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moco.comparison.made_up import diverged_record, made_up_record, made_up_records
from shuffle_batchnorm.moco.comparison.summary import (
    ResultsError,
    check_records,
    combine_leaks,
    diverged,
    independent,
    mean_over_seeds,
    number,
    on_a_par,
    paired,
    read_results,
    summarise,
    tidy,
    verdicts,
)


def test_three_seeds_give_their_own_spread_and_students_interval() -> None:
    leak = combine_leaks([0.1, 0.2, 0.3], [9.0, 9.0, 9.0])
    assert leak is not None
    assert leak.error == pytest.approx(0.1 / math.sqrt(3))
    # Student's t with 2 degrees of freedom leaves 2.5 % above 4.303.
    assert leak.high == pytest.approx(0.2 + 4.30265 * 0.1 / math.sqrt(3), abs=1e-5)
    assert leak.low == pytest.approx(0.2 - 4.30265 * 0.1 / math.sqrt(3), abs=1e-5)


def test_two_seeds_pool_the_errors_of_their_runs() -> None:
    leak = combine_leaks([0.1, 0.3], [0.03, 0.04])
    assert leak is not None
    assert leak.mean == pytest.approx(0.2)
    assert leak.error == pytest.approx(0.05 / 2)
    assert leak.high == pytest.approx(0.2 + 1.959964 * 0.025)


def test_the_interval_of_five_seeds_covers_at_its_rate() -> None:
    """Fails with the normal quantile in place of Student's: that covers 88 % of the time."""
    random = np.random.default_rng(0)
    trials = random.normal(0.0, 1.0, (2000, 5)).tolist()
    leaks = [combine_leaks(trial, [None] * 5) for trial in trials]
    covered = [leak.low <= 0 <= leak.high for leak in leaks if leak and leak.low and leak.high]
    assert 0.935 < np.mean(covered) < 0.965


def test_pairs_take_what_seeds_do_to_all_out() -> None:
    """By hand: 0.02, 0.04, 0.03 more; one seed diverged, one has no partner, one kind has one."""
    gains = {0: 0.02, 1: 0.04, 2: 0.03}
    runs = [made_up_record("local", seed, knn=0.5 + 0.1 * seed) for seed in range(4)]
    runs += [made_up_record("regroup", k, knn=0.5 + 0.1 * k + gain) for k, gain in gains.items()]
    runs += [diverged_record("regroup", 3), made_up_record("regroup", 9, knn=0.1)]
    runs += [made_up_record("sync", 0, knn=0.9), made_up_record("sync", 9, knn=0.9)]
    found = paired(runs, "knn")
    assert list(found) == ["regroup"]
    gain = found["regroup"]
    assert gain.mean == pytest.approx(0.03)
    assert gain.error == pytest.approx(0.01 / math.sqrt(3))
    assert gain.low == pytest.approx(0.03 - 4.30265 * 0.01 / math.sqrt(3), abs=1e-5)


def test_without_errors_there_is_no_interval() -> None:
    own = combine_leaks([0.0], [0.0], [[-0.003, 0.004]])  # no key changed: not certain either
    assert own is not None
    assert (own.low, own.high) == (-0.003, 0.004)
    both = combine_leaks([0.1, 0.3], [0.03, 0.04], [[0.07, 0.2], [0.26, 0.3]])
    assert both is not None
    assert both.low == pytest.approx(0.2 - 0.025)
    assert both.high == pytest.approx(0.2 + 0.05)

    leak = combine_leaks([0.1, 0.3], [0.03, None])
    assert leak is not None
    assert leak.mean == pytest.approx(0.2)
    assert (leak.error, leak.low, leak.high) == (None, None, None)
    assert combine_leaks([], []) is None
    assert mean_over_seeds([]) is None


def test_a_run_that_diverged_is_counted_and_in_no_mean() -> None:
    runs = [made_up_record("swap", 0), diverged_record("swap", 1), made_up_record("swap", 2)]
    (swap,) = summarise(runs)
    assert (swap.runs, swap.diverged) == (3, 1)
    assert swap.leak is not None
    assert swap.knn is not None
    assert swap.leak.mean == pytest.approx((runs[0]["leak"] + runs[2]["leak"]) / 2)
    assert swap.knn.mean == pytest.approx((runs[0]["knn"] + runs[2]["knn"]) / 2)


@pytest.mark.parametrize("key", ["loss", "knn", "pretext_accuracy", "leak"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_any_score_that_is_not_finite_says_diverged(key: str, value: float) -> None:
    assert diverged(made_up_record() | {key: value})
    assert not diverged(made_up_record() | {key: None})


def test_divergence_survives_strict_json() -> None:
    """JSON has no NaN: without a mark, a diverged run would come back as one not measured."""
    text = json.dumps(tidy(diverged_record()), allow_nan=False)
    assert diverged(json.loads(text))
    assert tidy(made_up_record()) == made_up_record()


def test_order_is_that_of_the_runs() -> None:
    assert [one.bn for one in summarise(made_up_records(("swap", "local")))] == ["swap", "local"]


@pytest.mark.parametrize("value", [True, "0.3", None, math.nan, [0.3]])
def test_number_takes_finite_numbers_only(value: object) -> None:
    assert number({"leak": value}, "leak") is None
    assert number({}, "leak") is None
    assert number({"leak": 3}, "leak") == 3.0


def test_independent_are_those_whose_every_probe_saw_no_change() -> None:
    """Catches leaks of 0 by chance, which are no proof, also where their spread is 0."""
    runs = [made_up_record("eman", seed, leak=0.0, leak_interval=[0.0, 0.0]) for seed in range(3)]
    runs += [made_up_record("sync", seed, leak=0.0, leak_interval=[-0.1, 0.1]) for seed in range(3)]
    assert independent([*runs, made_up_record("eman", 3, leak_interval=None)]) == set()
    assert independent(runs) == {"eman"}


def test_on_a_par_are_those_within_two_errors_of_the_best() -> None:
    knn = {
        "local": [0.95, 0.951, 0.952],
        "regroup": [0.97, 0.98, 0.99],
        "sync": [0.97, 0.975, 0.98],
    }
    runs = [made_up_record(bn, k, knn=v) for bn, vs in knn.items() for k, v in enumerate(vs)]
    assert on_a_par(summarise(runs)) == {"regroup", "sync"}
    # Two seeds are too few, and one method alone is no winner.
    assert on_a_par(summarise([run for run in runs if run["seed"] < 2])) == set()
    assert on_a_par(summarise([run for run in runs if run["bn"] == "local"])) == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bn": "local"}', "must be a list of records, is a dict"),
        ("[]", "holds no record"),
        ("[3]", "record 0 of .* is a int, not an object"),
        ('[{"bn": "local", "seed": 0}, {"seed": 0}]', "record 1 of .* has no 'bn'"),
    ],
)
def test_a_bad_file_of_results_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_records_pass_as_they_are() -> None:
    runs = made_up_records()
    assert check_records(runs, "records") is runs


def test_a_verdict_is_of_the_runs_of_its_own_kind() -> None:
    """Catches keys that nobody recognises, called cured because those of other kinds are."""
    terms = {"local": (0.3, 0.5, 0.2), "regroup": (0.0, 0.01, 0.01)}
    runs = [
        made_up_record(bn, seed, leak=leak + seed / 1000, leak_as_trained=trained, leak_fresh=fresh)
        for bn, (leak, trained, fresh) in terms.items()
        for seed in range(-1, 2)
    ]
    said = verdicts(runs)
    assert said["local"].startswith("a leak: at least 0.")
    assert said["regroup"].startswith("can't tell: only 1.0 % of the keys are recognised at all")
