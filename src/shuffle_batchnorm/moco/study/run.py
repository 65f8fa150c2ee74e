"""The study: its runs one after another, in as many processes as are started on its folder.

The folder holds ``runs/CELL-seedK``, a run each; ``records.json``, one slim record per run that has
ended; and what `page.py` writes.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from shuffle_batchnorm.moco.checkpoint import CheckpointError, HeldError, folder_lock
from shuffle_batchnorm.moco.comparison.compare import Train
from shuffle_batchnorm.moco.comparison.summary import Record
from shuffle_batchnorm.moco.comparison.tables import run_line
from shuffle_batchnorm.moco.config import ConfigError, DataConfig
from shuffle_batchnorm.moco.data.images import DataError
from shuffle_batchnorm.moco.data.loading import load_data
from shuffle_batchnorm.moco.ranks.launch import under_torchrun
from shuffle_batchnorm.moco.trainer import train as train_run
from shuffle_batchnorm.probe.progress import Console

from .cells import CALL, CELLS, SEEDS, Cell, Run, planned
from .page import write_page
from .records import Records, merged, of_folders, read_records, write_records

RECORDS = "records.json"
# In a log a line per run is enough; in a terminal each has its bar.
train_quietly = functools.partial(train_run, progress=None)


def study(
    output: Path,
    seeds: Sequence[int] = SEEDS,
    cells: Sequence[Cell] = CELLS,
    *,
    earlier: Path | None = None,
    data_path: Path | None = None,
    report_only: bool = False,
    command: str = CALL,
    train: Train = train_quietly,
) -> Records:
    """Train every cell with every seed, write `records.json` after each run, and the page.

    A run that has ended is not trained again, one that was interrupted goes on, and one that
    another process is training is left to it: several calls with one folder share the work.

    Communication: none. Every run is of one process and one thread.

    Args:
        output: the study's folder; made if it is missing.
        seeds: of the runs.
        cells: what to train; those whose data set is missing are left out, after a line that says
            where to get it.
        earlier: a file of records; its runs are not trained again.
        data_path: of the data sets that do not come with a package.
        report_only: train nothing, and write the page from what is there.
        command: what reproduces it, for the page.
        train: trains one run.

    Returns:
        What `records.json` holds then: of these runs, of `earlier`, and of `records.json`.

    Raises:
        ConfigError: a run that can't be trained, or no seed (before any is).
        CheckpointError: a file that can't be read or written.
        ResultsError: records of other cells than these; none at all for the page.
        Stopped: a signal came; the run is saved.
    """
    if under_torchrun():
        raise ConfigError(f"{CALL}: its runs are of one process each; start it without torchrun")
    some = cells if report_only else available(cells, data_path)
    plan = planned(some, seeds, output, data_path)
    if not report_only:
        train_all(plan, output, earlier, train)
    records = update(output, plan, earlier)
    if records.runs or report_only:
        print(f"The page: {write_page(output, records, command=command)}", flush=True)
    return records


def train_all(plan: Sequence[Run], output: Path, earlier: Path | None, train: Train) -> None:
    """Train what is left, until all runs have ended or are other processes'."""
    for run in plan:
        make_folder(run.config.run.output)
    known = {(record["cell"], record["seed"]) for record in update(output, plan, earlier).runs}
    left = [run for run in plan if (run.cell.name, run.seed) not in known]
    console = Console(CALL, shown=True)
    console.say(f"{len(plan)} runs, {len(plan) - len(left)} have ended before")
    while left:
        done = []
        for run in left:
            record = try_run(run, train)
            if record is not None:
                done.append(run)
                update(output, plan, earlier)
                where = f"[{plan.index(run) + 1}/{len(plan)}] {run.cell.name}, seed {run.seed}"
                console.say(f"{where}: {run_line(record)}")
        left = [run for run in left if run not in done]
        if left and not done:
            names = ", ".join(run.config.run.output.name for run in left)
            console.say(f"other processes are training {names}")
            break


def try_run(run: Run, train: Train) -> Record | None:
    """Train a run, or take the record of one that has ended; None if another process holds it."""
    folder = run.config.run.output
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with folder_lock(folder, patience=0):  # the trainer would wait for it
            pass
        return train(run.config)
    except HeldError:
        return None
    finally:
        torch.set_num_threads(threads)


def update(output: Path, plan: Sequence[Run], earlier: Path | None) -> Records:
    """Bring `records.json` up to date with the folders of the runs, and return what it holds."""
    path = output / RECORDS
    with folder_lock(output):
        files = [] if earlier is None else [read_records(earlier)]
        files += [read_records(path)] if path.exists() else []
        records = merged(*files, of_folders(plan))
        write_records(path, records)
    return records


def available(cells: Sequence[Cell], data_path: Path | None) -> list[Cell]:
    """The cells whose data set is there; what is missing is said once."""
    missing = set()
    for name in {cell.dataset for cell in cells} - {DataConfig().dataset}:
        try:
            load_data(DataConfig(dataset=name, data_path=data_path))
        except DataError as error:
            missing.add(name)
            Console(CALL, shown=True).say(f"without the cells of {name}: {error}")
    return [cell for cell in cells if cell.dataset not in missing]


def make_folder(folder: Path) -> None:
    """Make the folder of a run, which a lock that is only tried must not remove again.

    Raises:
        CheckpointError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{CALL}: --output {folder}: {error.strerror}") from error
