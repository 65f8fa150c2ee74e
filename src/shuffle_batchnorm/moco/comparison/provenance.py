"""Where a comparison's numbers are from: code, date, device, images, parameters.

A run's record has its counts; its `config.json` has when, by which code and with which versions it
was begun. What a record lacks, as those of earlier versions do, is said to be unknown.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shuffle_batchnorm.moco.checkpoint import read_object
from shuffle_batchnorm.moco.journal import CONFIG

from .summary import Record, number

UNKNOWN = "unknown"
Words = Callable[[Record], str | None]


def with_origin(record: Record, folder: Path) -> Record:
    """The record of the run in a folder, with what that notes of the run's starts.

    Adds `begun` (the first start, ISO 8601, UTC), and of all starts the different `commits`
    (None where it wasn't known) and `versions` of shuffle_batchnorm and torch.
    """
    path = folder / CONFIG
    starts = read_object(path, {}).get("starts") if path.exists() else None
    if not starts:
        return record
    packages = "shuffle_batchnorm", "torch"
    return record | {
        "begun": starts[0].get("time"),
        "commits": unique([start.get("commit") for start in starts]),
        "versions": {
            name: unique([start.get("versions", {}).get(name) for start in starts])
            for name in packages
        },
    }


def provenance(records: Sequence[Record]) -> dict[str, str]:
    """Where the runs are from, as rows of the page: name to words."""
    rows: dict[str, Words] = {
        "code": code,
        "torch": lambda record: joined(version(record, "torch")),
        "date": lambda record: str(record["begun"])[:10] if record.get("begun") else None,
        "device": lambda record: record.get("device"),
        "images": images,
        "parameters": parameters,
    }
    return {name: told(records, words) for name, words in rows.items()}


def told(records: Sequence[Record], words: Words) -> str:
    """What the records say, each answer once; and how many say nothing."""
    answers = [words(record) for record in records]
    silent = answers.count(None)
    if silent == len(answers):
        return f"{UNKNOWN}: the records do not say"
    said = "; ".join(unique([answer for answer in answers if answer is not None]))
    return f"{said}; {UNKNOWN} for {silent} of {len(answers)} runs" if silent else said


def code(record: Record) -> str | None:
    """The version and commits of the code that a run was made by."""
    if "commits" not in record:
        return None
    of_package = joined(version(record, "shuffle_batchnorm")) or f"version {UNKNOWN}"
    return f"shuffle_batchnorm {of_package}, {joined(map(commit, record['commits']))}"


def commit(name: str | None) -> str:
    """A commit in words, so much of it as nobody mistakes; a plus means that files were changed.

    Example:
        >>> commit("67f698a+")
        'commit 67f698a with uncommitted changes'
    """
    if name is None:
        return f"commit {UNKNOWN} (not run from a git checkout)"
    return f"commit {name.rstrip('+')[:12]}" + " with uncommitted changes" * name.endswith("+")


def version(record: Record, package: str) -> list[str]:
    """The versions of a package that a run was made with; several if it was resumed."""
    return [str(found) for found in record.get("versions", {}).get(package) or [] if found]


def images(record: Record) -> str | None:
    """How many images a run had."""
    train, test = number(record, "train_images"), number(record, "test_images")
    return None if train is None or test is None else f"{train:,.0f} training, {test:,.0f} held out"


def parameters(record: Record) -> str | None:
    """How many parameters the query encoder has."""
    count = number(record, "parameters")
    return None if count is None else f"{count:,.0f} in the query encoder, its head included"


def joined(words: Any) -> str | None:
    """The words in the order of a run's starts; None if there are none."""
    return ", then ".join(words) or None


def unique(values: Sequence[Any]) -> list[Any]:
    """Each value once, in the order in which they first come."""
    return list(dict.fromkeys(values))
