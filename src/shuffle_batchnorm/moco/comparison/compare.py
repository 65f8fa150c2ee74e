"""Several kinds of batch norm and several seeds, one after another, in one report.

A comparison's folder holds `comparison.json`, what it was begun with; `runs/BN-seedK`, a run each;
`results.json`, the records of the runs that have ended; and what `report.py` writes.
"""

import json
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch

from shuffle_batchnorm.moco.checkpoint import FREE, CheckpointError, write_atomically
from shuffle_batchnorm.moco.config import Config, ConfigError, Norm, flag, flat, to_dict, validate
from shuffle_batchnorm.moco.journal import CONFIG, RECORD, versions
from shuffle_batchnorm.moco.ranks.launch import Place, Stopped, launch, world_size

from .report import write_report
from .summary import Record, ResultsError, check_records, read_json, tidy
from .tables import run_line, text_table

Train: TypeAlias = Callable[[Config], Record]

CALL = "compare"
BEGUN, RESULTS = "comparison.json", "results.json"
# What differs from run to run in one comparison.
VARIED = {"bn", "seed"}
# Of the flags that may change from one start to the next, what the page needn't tell.
UNTOLD = VARIED | (FREE - {"device"}) | {"eval_every"}


def compare(
    config: Config,
    bns: Sequence[Norm],
    seeds: Sequence[int],
    output: Path,
    *,
    command: str | None = None,
    train: Train | None = None,
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
        command: what reproduces it, for the page; by default put together from the arguments.
        train: trains one run; by default `trainer.train`.

    Returns:
        One record per run, in the order of the runs. On other ranks than the first: none.

    Raises:
        ConfigError: nothing to compare, a name or a seed twice, a run that can't be trained (before
            any is), or a folder with a comparison of another configuration.
        ResultsError: a run's record can't be read.
    """
    train_one = train or default_train()
    plan = planned(config, bns, seeds, output)
    environments = begin(output, plan)
    if "RANK" in os.environ:
        # One process group for all runs: a second one would meet at the first one's addresses.
        results: list[Record] = launch(run_all, config.run, plan, output, train_one)
    else:
        results = run_all(None, plan, output, train_one)
    if not is_first():
        return []
    page = write_report(
        output,
        results,
        command=command or written_command(config, bns, seeds, output),
        setup=setup(config, environments),
    )
    print(f"\n{text_table(results)}\n\nThe page: {page}", flush=True)
    return results


def run_all(
    place: Place | None, plan: Sequence[Config], output: Path, train: Train
) -> list[Record]:
    """Run what has not ended yet; on the first rank, print and keep every record at once.

    Raises:
        Stopped: a signal came between two runs; `place` is where it is noted.
    """
    first, together = is_first(), "RANK" in os.environ
    records: dict[Path, Record] = {}
    for folder in [run.run.output for run in plan] if first else []:
        record = finished(folder)
        if record is not None:
            records[folder] = record
    for position, one in enumerate(plan, start=1):
        folder = one.run.output
        had_ended = folder in records
        # Ranks of torchrun leave it to the trainer, where they agree on what the first one sees.
        if together or not had_ended:
            record = train(one)
            if first and not had_ended:
                records[folder] = tidy(record)
        if first:
            done = [records[run.run.output] for run in plan if run.run.output in records]
            save_json(output / RESULTS, done)
            which = f"[{position}/{len(plan)}] {one.norm.bn}, seed {one.run.seed}: "
            said = " (had ended before)" if had_ended else ""
            print(f"{which}{run_line(records[folder])}{said}", flush=True)
        if place is not None and place.stop.signum:
            raise Stopped(place.stop.signum, f"{CALL}: stopped after run {position} of {len(plan)}")
    return [records[run.run.output] for run in plan] if first else []


def default_train() -> Train:
    """The trainer; imported when it is needed, since a finished comparison needs none of it."""
    from shuffle_batchnorm.moco.trainer import train

    return train


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
    ranks = world_size(config.run)
    for run in runs:
        validate(run, ranks)
    return runs


def is_first() -> bool:
    """Whether this is the process that writes and prints: torchrun starts others beside it."""
    return os.environ.get("RANK", "0") == "0"


def begin(output: Path, plan: Sequence[Config]) -> list[dict[str, Any]]:
    """Note what a comparison is begun with, or see that it is the same as before.

    Returns:
        The environments that it has run in so far.

    Raises:
        ConfigError: the folder has a comparison, or runs, of another configuration.
    """
    path = output / BEGUN
    now: dict[str, Any] = {
        "config": to_dict(plan[0]),
        "world_size": world_size(plan[0].run),
        "environments": [environment()],
    }
    if path.exists():
        before = begun(path)
        refuse_changes(path, before, now, VARIED)
        seen = before.get("environments", [])
        now["environments"] = seen + [one for one in now["environments"] if one not in seen]
    for run in plan:  # a run that has ended is not started, so that the trainer can't look
        of_run = run.run.output / CONFIG
        if of_run.exists():
            refuse_changes(of_run, begun(of_run), now | {"config": to_dict(run)}, set())
    if is_first():
        save_json(path, now)
    return list(now["environments"])


def begun(path: Path) -> dict[str, Any]:
    """What a comparison, or a run, was begun with.

    Raises:
        ConfigError: the file is something else.
    """
    before = read_json(path)
    if not isinstance(before, dict) or not before.keys() >= {"config", "world_size"}:
        raise ConfigError(f"{CALL}: {path} does not say what was begun; choose another --output")
    return before


def refuse_changes(
    path: Path, before: dict[str, Any], now: dict[str, Any], varied: set[str]
) -> None:
    """Refuse to put runs together that can't be compared.

    Raises:
        ConfigError: names all flags that differ.
    """
    old, new = (
        {name: value for part in side["config"].values() for name, value in part.items()}
        for side in (before, now)
    )
    changes = [
        f"{flag(name)} (was {old.get(name)}, is {new.get(name)})"
        for name in {**new, **old}
        if name not in FREE | varied and old.get(name) != new.get(name)
    ]
    if before["world_size"] != now["world_size"]:
        changes.append(f"number of ranks (was {before['world_size']}, is {now['world_size']})")
    if changes:
        raise ConfigError(
            f"{CALL}: {path} was begun with another {', '.join(changes)}; choose another --output"
        )


def finished(folder: Path) -> Record | None:
    """The record of a run that has ended; None of one that hasn't, or hasn't begun.

    Raises:
        ResultsError: there is one, but it is no record.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record, dict):
        raise ResultsError(f"{CALL}: {path} must be an object, is a {type(record).__name__}")
    if not record.get("complete"):
        return None
    return tidy(check_records([record], str(path))[0])


def save_json(path: Path, value: Any) -> None:
    """Write a file that is whole or the old one, whatever happens meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{CALL}: --output {path.parent}: {error.strerror}") from error
    write_atomically(path, f"{json.dumps(value, indent=1, allow_nan=False)}\n".encode())


def environment() -> dict[str, Any]:
    """The versions and the hardware that a comparison runs with."""
    found = versions()
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["CPU"] = f"{processor()} ({torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return found


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def setup(config: Config, environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page tells of the set-up."""
    parts: dict[str, Any] = {
        part: {name: value for name, value in values.items() if name not in UNTOLD}
        for part, values in to_dict(config).items()
    }
    parts["data"]["image_size"] = config.data.side
    parts["run"] = {"ranks": world_size(config.run), **parts["run"]}
    for position, one in enumerate(environments, start=1):
        parts["environment" if position == 1 else f"environment {position}"] = one
    return parts


def written_command(config: Config, bns: Sequence[Norm], seeds: Sequence[int], output: Path) -> str:
    """A command line that does this comparison: all flags that are not the default."""
    words = ["shuffle-batchnorm", "compare", "--bn", ",".join(bns)]
    words += ["--seeds", ",".join(map(str, seeds))]
    default = flat(Config())
    for name, value in flat(config).items():
        if name in VARIED | {"output", "resume"} or value == default[name]:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name).removeprefix('--')}")
        else:
            words += [flag(name), str(value)]
    return shlex.join([*words, "--output", str(output)])
