"""The training loop: one run from its configuration to its record, resumed where it was left."""

import math
import signal
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.probe.isolation import seed_all
from shuffle_batchnorm.probe.progress import SILENT, Console
from shuffle_batchnorm.shuffle.state import get_shuffle_state, set_shuffle_state

from . import checkpoint, journal
from .build import Views, build_model, parallelise
from .checkpoint import BEST, LAST, State, to_cpu
from .config import CALL, Config, to_dict, validate
from .data.images import Images
from .data.loading import EpochBatches, load_data, make_loader
from .journal import RECORD
from .measure import Measurements, check_images, leak_figures, remarks
from .random_state import get_random_state, own_random_state, set_random_state
from .ranks.control import StopAgreement, gather_objects, on_rank_0, sum_over_ranks
from .ranks.launch import Rank, launch, world_size
from .ranks.spawn import Stopped
from .resume import find_run, own_buffers, restore_model
from .schedule import learning_rate

Record = dict[str, Any]


def train(config: Config, *, progress: bool | None = True) -> Record:
    """Train a model, or go on with it, and measure it.

    Communication: see `launch` for how the ranks meet.

    Args:
        config: the run. Its folder gets ``last.pt``, ``best.pt``, ``config.json``, ``log.csv``,
            ``steps.csv`` and, at the end, ``record.json``.
        progress: whether the first rank says on stderr what it does; None for: in a terminal only.

    Returns:
        What is in ``record.json``: configuration, leak, kNN, curve and more, as plain values. It
        is that of the earlier run if ``resume`` is set and the run was at its end.

    Raises:
        ConfigError: flags that don't go together.
        DataError: no such data set.
        NetworkError: no such network.
        CheckpointError: nothing to go on with, another configuration, or a full disk.
        Stopped: SIGTERM or SIGINT; a checkpoint is written.
    """
    run = config.run
    validate(config, world_size(run.ranks, run.device))
    console = Console(CALL, progress)
    work = train_on_rank, config, progress
    record: Record = launch(
        *work, ranks=run.ranks, device=run.device, graceful=True, console=console
    )
    return record


def train_on_rank(rank: Rank, config: Config, progress: bool | None = True) -> Record:
    """Train on one rank of several, or the only one."""
    console = Console(CALL, progress if rank.index == 0 else False)
    with ExitStack() as stack:
        stack.callback(console.close)
        stack.enter_context(own_random_state())
        console.status(f"reading {config.data.dataset}")
        images = load_data(config.data)
        check_images(config, images, rank.world_size)
        on_rank_0(rank, lambda: stack.enter_context(checkpoint.folder_lock(config.run.output)))
        found = on_rank_0(rank, lambda: find_run(config, rank))
        if found.record is not None:
            console.say(f"the run in {config.run.output} had ended before")
            return found.record
        for remark in remarks(config, images) if rank.index == 0 else ():
            journal.warn(CALL, remark)
        trainer = Trainer(rank, config, images, found.checkpoint, console)
        stack.callback(trainer.close)
        return trainer.run()


class Trainer:
    """One rank's part in a run.

    Args:
        rank: this rank.
        config: the run.
        images: its data set.
        state: the checkpoint to go on from; None at the beginning.
        console: where to say what it does.
    """

    def __init__(
        self,
        rank: Rank,
        config: Config,
        images: Images,
        state: State | None,
        console: Console = SILENT,
    ) -> None:
        self.rank, self.config, self.folder = rank, config, config.run.output
        self.console = console
        optim = config.optim
        self.model = build_model(config, images, rank.device)
        self.parallel = parallelise(self.model, rank)
        weights = self.model.encoder_q.parameters()
        self.optimizer = torch.optim.SGD(
            weights, optim.lr, optim.sgd_momentum, weight_decay=optim.weight_decay
        )
        self.batches = EpochBatches(
            len(images.train),  # type: ignore[arg-type]
            optim.batch_size,
            rank=rank.index,
            world_size=rank.world_size,
            seed=config.run.seed,
        )
        self.loader = make_loader(images.train, self.batches, config.data.workers)
        self.views = Views(config, images, rank)
        # In the middle of a training a log gets no lines of evaluations and checkpoints.
        self.brief = Console(CALL, None if console.shown else False)
        work = config, self.model, images, self.views, rank
        self.measurements = Measurements(*work, self.brief)
        self.stop = StopAgreement(rank)

        self.epoch = self.step_in_epoch = self.step = 0  # how many are done
        self.steps = optim.epochs * self.batches.steps
        self.curve: list[Record] = []
        self.best_knn = -1.0
        # Sums of loss and accuracy over all steps of this rank, which stay on the device; and the
        # progress of all ranks when the epoch and the row of steps.csv began.
        self.totals = torch.zeros(2, dtype=torch.float64, device=rank.device)
        self.at_epoch = self.at_row = Progress()
        self.seconds = 0.0  # of training, without evaluation
        seed_all(config.run.seed * 1000003 + rank.index)
        set_shuffle_state((config.run.seed, 0))
        if state is not None:
            self.restore(state)
        self.journal: journal.Journal | None = None
        if rank.index == 0:
            start = f"from step {self.step}" if self.step else "from the beginning"
            console.say(journal.setting(config, images, rank.world_size, rank.device))
            console.say(f"{start} of {self.steps} steps, to {self.folder}")
            if config.run.compile:
                console.status("compiling: the first steps take longer")
            done = self.step, self.curve
            self.journal = journal.Journal(config, rank.world_size, self.steps, *done, console)

    def run(self) -> Record:
        """Train to the end, and return the record."""
        for epoch in range(self.epoch, self.config.optim.epochs):
            self.train_epoch(epoch)
            self.finish_epoch(epoch)
        self.save(LAST)
        self.stop_if(self.stop.answer())
        return self.finish()

    def train_epoch(self, epoch: int) -> None:
        """Take the steps of an epoch that are left."""
        run = self.config.run
        self.batches.set_epoch(epoch, self.step_in_epoch)
        self.model.train()
        self.begun = time.perf_counter() - self.seconds
        for images, _ in self.loader if len(self.batches) else ():
            self.train_step(images, epoch, self.step_in_epoch)
            self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
            if self.step % run.log_every == 0:
                self.log_row(epoch)
            if self.journal is not None:
                self.journal.on_step()
            signum = self.stop.ask()
            if signum or self.step % run.save_every == 0:
                self.seconds = time.perf_counter() - self.begun
                self.save(LAST)
            self.stop_if(signum)
        self.at_end = self.progress()

    def train_step(self, images: Tensor, epoch: int, step_in_epoch: int) -> None:
        """Take one step; nothing in it waits for the device."""
        images = images.to(self.rank.device, non_blocking=True)
        view_1, view_2 = self.views.of_step(images, epoch, step_in_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.batches.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with self.views.autocast():
            result = self.parallel(view_1, view_2)
        result.loss.backward()
        self.optimizer.step()
        self.totals += torch.stack([result.loss.detach(), result.accuracy.detach()]).double()

    def finish_epoch(self, epoch: int) -> None:
        """Evaluate if it is time, and add the epoch to the curve."""
        run, optim = self.config.run, self.config.optim
        is_due = (epoch + 1) % run.eval_every == 0 or epoch + 1 == optim.epochs
        knn = self.measurements.knn() if is_due else None
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            **self.figures_since(self.at_epoch, self.at_end),
            "knn": knn,
            "seconds": self.seconds,
        }
        self.curve.append(row)
        self.epoch, self.step_in_epoch, self.at_epoch = epoch + 1, 0, self.at_end
        if self.journal is not None:
            self.journal.on_epoch(row)
        if knn is not None and knn > self.best_knn:
            self.best_knn = knn
            self.save(BEST)

    def finish(self) -> Record:
        """Measure the trained model, and write and return the record."""
        config, last = self.config, self.curve[-1]
        self.measurements.console = self.console
        diverged = not (math.isfinite(last["loss"]) and self.measurements.is_finite())
        # What has no finite features has no leak that could be measured.
        leak = None if diverged else self.measurements.leak()
        scales = {} if diverged else self.measurements.stability()
        linear = self.measurements.linear() if config.run.linear and not diverged else None
        record: Record = {
            "seed": config.run.seed,
            "epochs": config.optim.epochs,
            **self.measurements.facts(),
            **asdict(config.norm),
            **leak_figures(leak),
            "knn": last["knn"],
            # Records without it are what they were before there was a flag.
            **({"linear": linear} if config.run.linear else {}),
            "pretext_accuracy": last["pretext_accuracy"],
            "loss": last["loss"],
            "seconds": self.seconds,
            "samples_per_second": self.steps * config.optim.batch_size / max(self.seconds, 1e-9),
            "spectral_radius": scales.pop("spectral_radius", None),
            "stability": scales,
            "curve": self.curve,
            "diverged": diverged,
            "complete": True,
        }
        on_rank_0(self.rank, lambda: checkpoint.write_json(self.folder / RECORD, record))
        if self.journal is not None:
            self.journal.on_end(record, self.step)
        return record

    def progress(self) -> "Progress":
        """Return how far the run is; waits for the device and for all ranks."""
        loss, accuracy = sum_over_ranks(self.rank, self.totals)
        self.seconds = time.perf_counter() - self.begun
        return Progress(self.step, loss, accuracy, self.seconds)

    def figures_since(self, earlier: "Progress", now: "Progress") -> Record:
        """Return what a row of the log says of the steps between two states."""
        steps = now.step - earlier.step
        count = max(1, steps) * self.rank.world_size
        samples = steps * self.config.optim.batch_size
        return {
            "loss": (now.loss - earlier.loss) / count,
            "pretext_accuracy": (now.accuracy - earlier.accuracy) / count,
            "lr": learning_rate(self.config, self.step - 1, self.batches.steps),
            "samples_per_second": samples / max(1e-9, now.seconds - earlier.seconds),
        }

    def log_row(self, epoch: int) -> None:
        """Add a row to steps.csv."""
        now = self.progress()
        row = {"step": self.step, "epoch": epoch + 1, **self.figures_since(self.at_row, now)}
        self.at_row = now
        if self.journal is not None:
            self.journal.on_window(row)

    def save(self, name: str) -> None:
        """Write a checkpoint of all ranks; all of them learn if it can't be written."""
        self.brief.status(f"saving {name}")
        own = {
            "buffers": own_buffers(self.model),
            "random": get_random_state(self.rank.device),
            "totals": self.totals,
        }
        everyones = gather_objects(self.rank, to_cpu(own))

        def write() -> None:
            state = {
                "format": checkpoint.FORMAT,
                "config": to_dict(self.config),
                "versions": journal.versions(),
                "world_size": self.rank.world_size,
                "device": self.rank.device.type,
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ranks": everyones,
                "shuffle": get_shuffle_state(),
                "curve": self.curve,
                "best_knn": self.best_knn,
                "seconds": self.seconds,
                "marks": [tuple(self.at_epoch), tuple(self.at_row)],
            }
            checkpoint.save(self.folder / name, to_cpu(state))

        on_rank_0(self.rank, write)
        if self.journal is not None:
            self.journal.show()

    def restore(self, state: State) -> None:
        """Take everything from a checkpoint."""
        restore_model(self.model, state, self.rank)
        self.optimizer.load_state_dict(state["optimizer"])
        own = state["ranks"][self.rank.index]
        self.totals.copy_(own["totals"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.step, self.curve = state["step"], state["curve"]
        self.best_knn, self.seconds = state["best_knn"], state["seconds"]
        self.at_epoch, self.at_row = (Progress(*numbers) for numbers in state["marks"])
        set_shuffle_state(state["shuffle"])
        set_random_state(own["random"], self.rank.device)

    def stop_if(self, signum: int) -> None:
        """Stop if a signal asked for it, where a checkpoint has just been written.

        Raises:
            Stopped: `signum` is not 0.
        """
        if signum:
            raise Stopped(
                signum,
                f"{CALL}: stopped by {signal.Signals(signum).name} after step {self.step} of "
                f"{self.steps}, which is saved; --resume --output {self.folder} goes on",
            )

    def close(self) -> None:
        """Release the screen and the log files."""
        if self.journal is not None:
            self.journal.close()


class Progress(NamedTuple):
    """How far a run is: steps, sums of loss and accuracy over steps and ranks, seconds."""

    step: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    seconds: float = 0.0
