"""Records: what is kept of a run, and that none is lost or taken for another's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moco.study.fake_runs import record_of, train
from shuffle_batchnorm.moco.checkpoint import CheckpointError
from shuffle_batchnorm.moco.comparison.summary import ResultsError
from shuffle_batchnorm.moco.study.cells import Run, chosen, planned
from shuffle_batchnorm.moco.study.records import (
    Records,
    merged,
    of_folders,
    read_records,
    slim,
    write_records,
)


def plan_of(pattern: str, folder: Path, seeds: tuple[int, ...] = (10, 11)) -> list[Run]:
    return planned(chosen(pattern), seeds, folder)


def test_a_record_says_what_the_run_was_and_what_it_gave(tmp_path: Path) -> None:
    [run] = plan_of("n64-B2", tmp_path, (10,))
    record = slim(run, record_of(run.config))
    expected: dict[str, Any] = dict(cell="n64-B2", seed=10, part="grid", n=64, B=2, G=8)
    assert expected.items() <= record.items()
    assert record["changes"] == {"groups": 8, "bn": "regroup", "blocks": 2, "batch_size": 512}
    assert record["knn"] == record_of(run.config)["knn"]
    assert "curve" not in record
    [local] = plan_of("n8-B1", tmp_path, (10,))
    assert slim(local, record_of(local.config))["B"] == 1


def test_folders_give_the_runs_that_have_ended(tmp_path: Path) -> None:
    plan = plan_of("n8-B[12]", tmp_path)
    for run in plan[:3]:
        train(run.config)
    runs, environments = of_folders(plan)
    assert [(run["cell"], run["seed"]) for run in runs] == [
        ("n8-B1", 10),
        ("n8-B2", 10),
        ("n8-B1", 11),
    ]
    assert merged(Records(runs, environments)).environments == [
        dict(versions=dict(torch="2"), commit="abc", processor="a CPU", cpus=2)
    ]


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    """Catches a cell that was redefined while its runs were still lying about."""
    [run] = plan_of("n8-B2", tmp_path, (10,))
    train(replace(run.config, moco=replace(run.config.moco, temperature=0.5)))
    with pytest.raises(CheckpointError, match=r"study: .*--temperature \(was 0.5, is 0.07\)"):
        of_folders([run])


def test_merging_keeps_all_and_prefers_the_last(tmp_path: Path) -> None:
    plan = plan_of("n8-B[12]", tmp_path)
    for run in plan:
        train(run.config)
    full = of_folders(plan)
    first, second = full.runs[1], full.runs[1] | {"leak": 0.9}
    one = Records([full.runs[3], first], [{"cpus": 1}, {"cpus": 2}])
    other = Records([full.runs[0], second], [{"cpus": 2}])
    assert merged(one, other) == Records(
        [full.runs[0], second, full.runs[3]], [{"cpus": 1}, {"cpus": 2}]
    )


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = plan_of("n8-B1", tmp_path)
    for run in plan:
        train(run.config)
    path, records = tmp_path / "records.json", of_folders(plan)
    write_records(path, records)
    assert read_records(path) == records
    assert len(path.read_text().splitlines()) == 3 + len(records.environments) + len(records.runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "n7-B1"}, "cell n7-B1 is not one of this version"),
        ({"cell": ["n8-B1"]}, r"cell \['n8-B1'\] is not one of this version"),
        ({"changes": {"groups": 16}}, "cell n8-B1 is not one of this version, or has other"),
        ({"n": None}, "cell n8-B1 is not one of this version, or has other"),
        ({"part": "control"}, "cell n8-B1 is not one of this version, or has other"),
        ({"seed": "10"}, "the seed must be a whole number, got '10'"),
    ],
)
def test_records_of_other_cells_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Catches a file, written by hand or damaged, that ends as a mistake of the program's."""
    [run] = plan_of("n8-B1", tmp_path, (10,))
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"records": [slim(run, {}) | change], "environments": []}))
    with pytest.raises(ResultsError, match=f"^study: record 0 of .*records.json: {message}"):
        read_records(path)
