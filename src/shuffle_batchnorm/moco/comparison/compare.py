"""Several kinds of batch norm and several seeds, one after another, in one report.

A comparison's folder holds `comparison.json`, what it was begun with; `runs/BN-seedK`, a run each;
`results.json`, the records of the runs that have ended; and what `report.py` writes.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch

from shuffle_batchnorm.moco.checkpoint import (
    FREE,
    CheckpointError,
    read_json,
    refuse_changes,
    write_json,
)
from shuffle_batchnorm.moco.config import Config, ConfigError, Norm, to_dict, validate
from shuffle_batchnorm.moco.journal import CONFIG, RECORD, processor, versions
from shuffle_batchnorm.moco.ranks.launch import (
    Rank,
    is_rank_0,
    launch,
    under_torchrun,
    world_size,
)
from shuffle_batchnorm.moco.ranks.spawn import Stopped
from shuffle_batchnorm.moco.trainer import train as train_run
from shuffle_batchnorm.probe.progress import Console

from .provenance import with_origin
from .report import RESULTS, write_report
from .summary import Record, check_record, tidy, verdicts
from .tables import markdown_table, run_line

Train: TypeAlias = Callable[[Config], Record]

CALL = "compare"
COMPARISON = "comparison.json"
# What differs from run to run in one comparison.
VARIED = frozenset({"bn", "seed"})
# Of the flags that may change from one start to the next, what the page needn't tell.
UNTOLD = VARIED | (FREE - {"device"}) | {"eval_every"}


def compare(
    config: Config,
    bns: Sequence[Norm],
    seeds: Sequence[int],
    output: Path,
    *,
    command: str,
    train: Train = train_run,
) -> list[Record]:
    """Train with every batch norm and every seed; write `results.json`, the figures and the page.

    The order is seed by seed, and in each seed all batch norms in turn, so that a slower hour of
    the machine meets all of them and an interrupted comparison is fair. A run that has ended is
    not run again, one that was interrupted goes on, and `results.json` is rewritten after each.

    Communication: that of the runs. Under torchrun all ranks call it; the first one writes and
    prints.

    Args:
        config: all of a run but its `bn`, `seed`, `output` and `resume`, which are set here.
        bns: kinds of batch norm of the key encoder.
        seeds: seeds of the runs.
        output: the comparison's folder; made if it is missing.
        command: what reproduces it, for the page.
        train: trains one run.

    Returns:
        One record per run, in the order of the runs. On other ranks than the first: none.

    Raises:
        ConfigError: nothing to compare, a name or a seed twice, a run that can't be trained (before
            any is).
        CheckpointError: a folder with a comparison of another configuration, a file that can't be
            read or written.
        ResultsError: a run's record is none.
    """
    plan = planned(config, bns, seeds, output)
    environments = begin(output, plan)
    if under_torchrun():
        # One process group for all runs: a second one would meet at the first one's addresses.
        work = plan, output, train
        results: list[Record] = launch(run_all, *work, device=config.run.device, graceful=True)
    else:
        results = run_all(None, plan, output, train)
    if not is_rank_0():
        return []
    page = write_report(output, results, command=command, setup=setup(config, environments))
    said = "".join(f"{bn}: {words}\n" for bn, words in verdicts(results).items())
    print(f"{markdown_table(results)}\n{said}The page: {page}", flush=True)
    return results


def run_all(rank: Rank | None, plan: Sequence[Config], output: Path, train: Train) -> list[Record]:
    """Run what has not ended yet; on the first rank, print and save every record at once.

    Raises:
        Stopped: a signal came between two runs; `rank` is where it is noted.
    """
    first, together = is_rank_0(), under_torchrun()
    console = Console(CALL, first)
    found = {run.run.output: finished(run.run.output) for run in plan} if first else {}
    records = {folder: record for folder, record in found.items() if record is not None}
    for position, one in enumerate(plan, start=1):
        folder = one.run.output
        had_ended = folder in records
        if not had_ended:
            after = plan[position : position + 1]
            then = "".join(f"; next: {name_of(run)}" for run in after)
            console.say(f"[{position}/{len(plan)}] {name_of(one)}{then}")
        # Ranks of torchrun leave it to the trainer, where they agree on what the first one sees.
        if together or not had_ended:
            record = train(one)
            if first and not had_ended:
                records[folder] = with_origin(tidy(record), folder)
        if first:
            done = [records[run.run.output] for run in plan if run.run.output in records]
            write_json(output / RESULTS, done)
            which = f"[{position}/{len(plan)}] {name_of(one)}: "
            said = " (had ended before)" if had_ended else ""
            console.say(f"{which}{run_line(records[folder])}{said}")
        if rank is not None and rank.stop.signum:
            raise Stopped(rank.stop.signum, f"{CALL}: stopped after run {position} of {len(plan)}")
    return [records[run.run.output] for run in plan] if first else []


def name_of(run: Config) -> str:
    """What tells a run from the others of a comparison."""
    return f"{run.norm.bn}, seed {run.run.seed}"


def planned(
    config: Config, bns: Sequence[Norm], seeds: Sequence[int], output: Path
) -> list[Config]:
    """The runs in their order, each seen to be one that can be trained.

    Raises:
        ConfigError: see `compare`.
    """
    for name, values in (("--bn", bns), ("--seeds", seeds)):
        if not values:
            raise ConfigError(f"{CALL}: {name} must name at least one, got none")
        twice = next((value for value in values if list(values).count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{CALL}: {name} names {twice} twice")
    known = get_args(Norm)
    unknown = next((bn for bn in bns if bn not in known), None)
    if unknown is not None:
        raise ConfigError(f"{CALL}: --bn must be of {', '.join(known)}, got {unknown}")
    runs = [
        replace(
            config,
            norm=replace(config.norm, bn=bn),
            run=replace(
                config.run, seed=seed, output=output / "runs" / f"{bn}-seed{seed}", resume=True
            ),
        )
        for seed in seeds
        for bn in bns
    ]
    for run in runs:
        validate(run, ranks_of(run))
    return runs


def ranks_of(config: Config) -> int:
    """The number of ranks of a run."""
    return world_size(config.run.ranks, config.run.device)


def begin(output: Path, plan: Sequence[Config]) -> list[dict[str, Any]]:
    """Note what a comparison is begun with, or see that it is the same as before.

    Returns:
        The environments that it has run in so far.

    Raises:
        CheckpointError: the folder has a comparison, or runs, of another configuration.
    """
    path, environments = output / COMPARISON, [environment()]
    now = {"config": to_dict(plan[0]), "world_size": ranks_of(plan[0])}
    if path.exists():
        before = read_json(path)
        refuse_changes(CALL, path, before, now, FREE | VARIED)
        seen = before.get("environments", [])
        environments = seen + [one for one in environments if one not in seen]
    for run in plan:  # a run that has ended is not started, so that the trainer can't check it
        of_run = run.run.output / CONFIG
        if of_run.exists():
            refuse_changes(CALL, of_run, read_json(of_run), now | {"config": to_dict(run)})
    if is_rank_0():
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{CALL}: --output {output}: {error.strerror}") from error
        write_json(path, now | {"environments": environments})
    return environments


def finished(folder: Path) -> Record | None:
    """The record of a run that has ended; None of one that hasn't, or hasn't begun.

    Raises:
        CheckpointError: it can't be read.
        ResultsError: there is one, but it is no record.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    record = read_json(path)
    if isinstance(record, dict) and not record.get("complete"):
        return None
    return with_origin(tidy(check_record(record, str(path))), folder)


def environment() -> dict[str, Any]:
    """The versions and the hardware that a comparison runs with."""
    found = versions()
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["CPU"] = f"{processor()} ({torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return found


def setup(config: Config, environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page tells of the set-up."""
    parts: dict[str, Any] = {
        part: {name: value for name, value in values.items() if name not in UNTOLD}
        for part, values in to_dict(config).items()
    }
    parts["data"]["image_size"] = config.data.side
    parts["run"] = {"ranks": ranks_of(config), **parts["run"]}
    for position, one in enumerate(environments, start=1):
        parts["environment" if position == 1 else f"environment {position}"] = one
    return parts
