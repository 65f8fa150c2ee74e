"""What the command line can say: one class per command, whose fields are its flags.

The docstrings, and the text below the fields, are what ``--help`` prints.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, Positional, Suppress, arg, subcommand

from .config import (
    LEAK_BATCHES,
    LEAK_KEYS,
    Config,
    ConfigError,
    Device,
    Norm,
    NormConfig,
    RunConfig,
    from_dict,
    to_dict,
)


@dataclass(frozen=True)
class Train(Config):
    """Train MoCo, or go on with --resume; measure kNN and the leak at the end.

    OUTPUT gets last.pt, best.pt, config.json, log.csv, steps.csv and record.json. SIGINT and
    SIGTERM save and leave, with exit code 130 and 143.
    """

    def act(self) -> None:
        """Run the command."""
        from .journal import outcome
        from .ranks.launch import is_rank_0
        from .trainer import train

        record = train(from_dict(to_dict(self)))
        if is_rank_0():
            print(f"train: {outcome(record)}", flush=True)


@dataclass(frozen=True)
class SharedNorm(NormConfig):
    """Whose batch statistics normalise the keys."""

    bn: Annotated[Norm, Fixed, Suppress] = "regroup"


@dataclass(frozen=True)
class SharedRun(RunConfig):
    """How and where it runs."""

    output: Path = Path("runs/compare")
    """Folder for the runs, results.json, the figures and report.html."""
    seed: Annotated[int, Fixed, Suppress] = 0
    resume: Annotated[bool, Fixed, Suppress] = True


@dataclass(frozen=True)
class Compare(Config):
    """Train with several --bn and seeds, in turn, and write one report.

    What has ended is not trained again, and what was interrupted goes on.
    """

    bn: Annotated[str, arg(metavar="BN,BN,...")] = "local,regroup"
    """Batch norms of the key encoder: local, sync, swap, regroup, batch-shuffle, eman, simclr."""
    seeds: Annotated[str, arg(metavar="INT,INT,...")] = "0"
    """Seeds of weights, order, views and queue."""
    norm: SharedNorm = field(default_factory=SharedNorm)
    run: SharedRun = field(default_factory=SharedRun)

    def act(self) -> None:
        """Run the command."""
        from .comparison.compare import compare

        bns: list[Any] = _list(self.bn)
        seeds = _seeds("compare", self.seeds)
        parts = self.data, self.network, self.norm, self.moco, self.optim, self.run
        config = from_dict(to_dict(Config(*parts)))
        compare(config, bns, seeds, config.run.output, command=_typed())


@dataclass(frozen=True)
class _Measure:
    checkpoint: Positional[Path]
    """last.pt or best.pt of a run."""
    ranks: int | None = None
    """Processes to start (default: as many as trained it); the groups of all stay the same."""
    device: Device = "auto"
    """Where to compute; auto takes GPUs if there are enough."""
    data_path: Path | None = None
    """Folder or archive of the data set, if it has moved."""
    json: Path | None = None
    """Also write the figures to this file."""

    def report(self, figures: dict[str, Any], line: str) -> None:
        """Write the figures if asked for, and print the line."""
        from .checkpoint import write_json
        from .ranks.launch import is_rank_0

        if is_rank_0():
            if self.json is not None:  # first: nobody may read what is printed
                write_json(self.json, figures)
            name = type(self).__name__.lower()
            print(f"{name}: {self.checkpoint}, epoch {figures['epoch']}: {line}", flush=True)


@dataclass(frozen=True)
class Evaluate(_Measure):
    """Tell how good the features in a checkpoint are: kNN and a linear probe."""

    def act(self) -> None:
        """Run the command."""
        from .journal import score
        from .measure_checkpoint import evaluate_checkpoint

        where = self.ranks, self.device, self.data_path
        figures = evaluate_checkpoint(self.checkpoint, *where, progress=True)
        names = {"kNN": "knn", "linear probe": "linear"}
        self.report(figures, ", ".join(score(n, figures[key]) for n, key in names.items()))


@dataclass(frozen=True)
class Probe(_Measure):
    """Tell how much the keys of a checkpoint leak, and how its activations grow."""

    batches: int = LEAK_BATCHES
    """Batches that are drawn."""
    keys: int = LEAK_KEYS
    """Keys that are measured in each."""
    by_layer: bool = False
    """Also tell through which modules of the key encoder the leak comes."""

    def act(self) -> None:
        """Run the command."""
        from .journal import leak_in_words
        from .measure_checkpoint import probe_checkpoint

        figures = probe_checkpoint(
            self.checkpoint,
            self.ranks,
            self.device,
            self.data_path,
            batches=self.batches,
            keys=self.keys,
            by_layer=self.by_layer,
            progress=True,
        )
        scale = max(figures["stability"]["ratio"])
        line = f"{leak_in_words(figures)}; scale against local {scale:.3g} at most"
        parts = figures.get("by_layer", {})
        width = max(map(len, parts), default=0)
        for name, part in parts.items():
            low, high = figures["layer_intervals"][name]
            line += f"\n{part:8.3f}  {name:{width}}  ({low:.3f} to {high:.3f})"
        self.report(figures, line)


@dataclass(frozen=True)
class Audit(_Measure):
    """Tell through which modules of an encoder the samples of a training batch see each other."""

    encoder: Literal["key", "query"] = "key"
    """Which of the two encoders."""

    def act(self) -> None:
        """Run the command."""
        from .measure_checkpoint import audit_checkpoint

        where = self.ranks, self.device, self.data_path
        figures = audit_checkpoint(self.checkpoint, *where, encoder=self.encoder, progress=True)
        text = figures.pop("text")
        self.report(figures, f"{self.encoder} encoder: {text}")


@dataclass(frozen=True)
class Study:
    """Train many small runs that differ in one thing each: how the leak depends on what.

    Several of these commands with one --output share the work; each goes on where it was stopped.
    """

    output: Path = Path("runs/study")
    """Folder for the runs, records.json, the figures and study.html."""
    seeds: Annotated[str, arg(metavar="INT,INT,...")] = "10,11,12,13,14"
    """Seeds of weights, order, views and queue."""
    cells: Annotated[str, arg(metavar="PATTERN,...")] = "*"
    """Names of the cells to train, with * and ? as in a shell: n8-*, for example."""
    records: Path | None = None
    """Records of earlier runs, which are not trained again."""
    data_path: Path | None = None
    """Folder of Fashion-MNIST, if it is not where Debian's package puts it."""
    report_only: bool = False
    """Train nothing; write the page from records.json and --records."""

    def act(self) -> None:
        """Run the command."""
        from .study.cells import chosen
        from .study.run import study

        study(
            self.output,
            _seeds("study", self.seeds),
            chosen(self.cells),
            earlier=self.records,
            data_path=self.data_path,
            report_only=self.report_only,
            command=_typed(),
        )


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Probe, subcommand("probe")]
    | Annotated[Audit, subcommand("audit")]
    | Annotated[Study, subcommand("study")]
)


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _typed() -> str:
    """Return this command as it can be typed again."""
    return shlex.join(["shuffle-batchnorm", *sys.argv[1:]])


def _seeds(call: str, text: str) -> list[int]:
    """Return the numbers of --seeds.

    Raises:
        ConfigError: one is no whole number.
    """
    seeds = _list(text)
    wrong = [seed for seed in seeds if not seed.isdecimal()]
    if wrong:
        raise ConfigError(f"{call}: --seeds must be whole numbers, got {wrong[0]}")
    return [int(seed) for seed in seeds]
