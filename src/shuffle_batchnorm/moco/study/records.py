"""The study's records: one per run, slim enough to be committed, merged from folders and files.

A file of them holds ``environments``, what they were measured with, and ``records``, one a line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shuffle_batchnorm.moco.checkpoint import read_object, refuse_changes, write_atomically
from shuffle_batchnorm.moco.comparison.compare import finished
from shuffle_batchnorm.moco.comparison.summary import Record, ResultsError, check_record
from shuffle_batchnorm.moco.config import to_dict
from shuffle_batchnorm.moco.journal import CONFIG

from .cells import BATCH, CALL, CELLS, Cell, Run

CELL_BY_NAME = {cell.name: cell for cell in CELLS}
_ORDER = {name: position for position, name in enumerate(CELL_BY_NAME)}
# What is kept of a run's own record.
KEPT = (
    "leak", "leak_standard_error", "leak_interval", "leak_as_trained", "leak_fresh", "knn",
    "linear", "pretext_accuracy", "loss", "seconds", "diverged",
)  # fmt: skip


class Records(NamedTuple):
    """Runs, and the distinct environments that they ran in."""

    runs: list[Record]
    environments: list[dict[str, Any]]


def slim(run: Run, record: Record) -> Record:
    """What the study keeps of a run: its cell, n, B and G, and what was measured."""
    measured = {key: record[key] for key in KEPT if key in record}
    return {**described(run.cell, run.seed), **measured}


def described(cell: Cell, seed: int) -> Record:
    """What the record of a run says before it is trained."""
    groups, bn = cell.changes["groups"], cell.changes["bn"]
    return {
        "cell": cell.name,
        "seed": seed,
        "part": cell.part,
        "n": cell.changes.get("batch_size", BATCH) // groups,
        "B": 1 if bn == "local" else cell.changes["blocks"],
        "G": groups,
        "bn": bn,
        "changes": cell.changes,
    }


def of_folders(plan: Sequence[Run]) -> Records:
    """What is known of the runs that have ended.

    Raises:
        CheckpointError: a file can't be read, or is of another configuration.
        ResultsError: a run's record is none.
    """
    records, environments = [], []
    for run in plan:
        record = finished(run.config.run.output)
        if record is None:
            continue
        path = run.config.run.output / CONFIG
        begun = read_object(path, {"config": dict, "starts": list})
        refuse_changes(CALL, path, begun, {"config": to_dict(run.config), "world_size": 1})
        records.append(slim(run, record))
        told = ("versions", "commit", "processor", "cpus")
        environments += [{name: start.get(name) for name in told} for start in begun["starts"]]
    return Records(records, environments)


def merged(*sources: Records) -> Records:
    """All runs, seed by seed in the order of the cells; of one run, the last source's record."""
    by_run = {(r["seed"], _ORDER[r["cell"]]): r for source in sources for r in source.runs}
    environments: list[dict[str, Any]] = []
    for one in (environment for source in sources for environment in source.environments):
        if one not in environments:
            environments.append(one)
    return Records([by_run[key] for key in sorted(by_run)], environments)


def read_records(path: Path) -> Records:
    """The content of a file that `write_records` wrote.

    Raises:
        CheckpointError: it can't be read, or is something else.
        ResultsError: a record of no cell, or of one that has changed since.
    """
    held = read_object(path, {"records": list, "environments": list})
    for position, record in enumerate(held["records"]):
        source = f"record {position} of {path}"
        check_record(record, source)
        seed, cell = record["seed"], CELL_BY_NAME.get(str(record.get("cell")))
        if not isinstance(seed, int):
            raise ResultsError(f"{CALL}: {source}: the seed must be a whole number, got {seed!r}")
        if cell is None or not described(cell, seed).items() <= record.items():
            raise ResultsError(
                f"{CALL}: {source}: cell {record.get('cell')} is not one of this version, or has "
                "other settings there"
            )
    return Records(held["records"], held["environments"])


def write_records(path: Path, records: Records) -> None:
    """Write a file that `read_records` reads, in one step.

    Raises:
        CheckpointError: the disk is full, say; the old file is as it was.
    """
    parts = []
    for name, values in (("environments", records.environments), ("records", records.runs)):
        lines = ",\n".join(map(json.dumps, values))
        parts.append(f'"{name}": [\n{lines}\n]')
    write_atomically(path, f"{{{', '.join(parts)}}}\n".encode())
