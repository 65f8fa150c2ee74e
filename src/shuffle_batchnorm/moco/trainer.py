"""The training loop: one run from its configuration to its record, resumed where it was left."""

import math
import signal
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from shuffle_batchnorm.shuffle.state import get_shuffle_state, set_shuffle_state

from . import checkpoint, journal
from .build import Views, build_model, parallelise
from .checkpoint import BEST, LAST, State, to_cpu
from .config import CALL, Config, to_dict, validate
from .data.images import Images
from .data.loading import EpochBatches, load_data, make_loader
from .journal import RECORD
from .measure import Evaluation, check_pool, find_leak, find_stability, is_finite, leak_figures
from .random_state import get_random_state, own_random_state, seed_all, set_random_state
from .ranks import launch
from .ranks.control import StopAgreement, gather_objects, on_rank_0, sum_over_ranks
from .ranks.launch import Place, Stopped
from .resume import find_run, own_buffers, restore_model
from .schedule import Mark, learning_rate

Record = dict[str, Any]


def train(config: Config) -> Record:
    """Train a model, or go on with it, and measure it.

    Communication: see `launch` for how the ranks meet.

    Args:
        config: the run. Its folder gets ``last.pt``, ``best.pt``, ``config.json``, ``log.csv``,
            ``steps.csv`` and, at the end, ``record.json``.

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
    validate(config, launch.world_size(config.run))
    record: Record = launch.launch(train_on_rank, config.run, config)
    return record


def train_on_rank(place: Place, config: Config) -> Record:
    """Train on one rank of several, or the only one."""
    with ExitStack() as stack:
        stack.enter_context(own_random_state(place.device))
        images = load_data(config.data)
        check_pool(config, images, place.world_size)
        on_rank_0(place, lambda: stack.enter_context(checkpoint.folder_lock(config.run.output)))
        begun = on_rank_0(place, lambda: find_run(config, place))
        if begun.record is not None:
            return begun.record
        trainer = Trainer(place, config, images, begun.state)
        stack.callback(trainer.close)
        return trainer.run()


class Trainer:
    """One rank's part in a run.

    Args:
        place: this rank.
        config: the run.
        images: its data set.
        state: the checkpoint to go on from; None at the beginning.
    """

    def __init__(self, place: Place, config: Config, images: Images, state: State | None) -> None:
        self.place, self.config, self.images = place, config, images
        self.folder, optim = config.run.output, config.optim
        self.model = build_model(config, images, place.device)
        self.parallel = parallelise(self.model, place)
        self.optimizer = torch.optim.SGD(
            self.model.encoder_q.parameters(),
            lr=optim.lr,
            momentum=optim.sgd_momentum,
            weight_decay=optim.weight_decay,
        )
        self.views = Views(config, images, place)
        self.batches = EpochBatches(
            len(images.train),  # type: ignore[arg-type]
            optim.batch_size,
            rank=place.rank,
            world_size=place.world_size,
            seed=config.run.seed,
        )
        self.loader = make_loader(images.train, self.batches, config.data.workers)
        self.evaluation = Evaluation(config, images, self.views, place)
        self.stop = StopAgreement(place)

        self.epoch = self.step_in_epoch = self.step = 0  # how many are done
        self.steps = optim.epochs * self.batches.steps
        self.curve: list[Record] = []
        self.best_knn = -1.0
        # Sums of loss and accuracy over all steps of this rank, which stay on the device; and what
        # they were, over all ranks, when the epoch and the row of steps.csv began.
        self.totals = torch.zeros(2, dtype=torch.float64, device=place.device)
        self.at_epoch, self.at_row = Mark(), Mark()
        self.seconds = 0.0  # of training, without evaluation
        seed_all(config.run.seed, place.rank, place.device)
        set_shuffle_state((config.run.seed, 0))
        if state is not None:
            self.restore(state)
        self.journal: journal.Journal | None = None
        if place.rank == 0:
            self.journal = journal.Journal(
                config, place.world_size, self.steps, self.step, self.curve
            )
            device = f"{place.device.type}, {place.world_size} rank(s)"
            begun = f"from step {self.step}" if self.step else "from the beginning"
            self.journal.say(f"{CALL}: {begun} of {self.steps}, on {device}, to {self.folder}")

    def run(self) -> Record:
        """Train to the end, and return the record."""
        for epoch in range(self.epoch, self.config.optim.epochs):
            self.train_epoch(epoch)
            self.finish_epoch(epoch)
            if epoch + 1 == self.config.optim.epochs:
                self.save(LAST)
        signum = self.stop.settle()
        if signum:
            self.leave(signum)
        return self.finish()

    def train_epoch(self, epoch: int) -> None:
        """Take the steps of an epoch that are left."""
        run = self.config.run
        self.batches.set_epoch(epoch, self.step_in_epoch)
        self.model.train()
        resumed_at = time.perf_counter() - self.seconds
        for images, _ in self.loader if len(self.batches) else ():
            self.train_step(images, epoch, self.step_in_epoch)
            self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
            if self.step % run.log_every == 0:
                mark = self.read(time.perf_counter() - resumed_at)
                self.log_row(mark, epoch)
            if self.journal is not None:
                self.journal.on_step()
            signum = self.stop.ask()
            if signum or self.step % run.save_every == 0:
                self.seconds = time.perf_counter() - resumed_at
                self.save(LAST)
            if signum:
                self.leave(signum)
        self.at_end = self.read(time.perf_counter() - resumed_at)
        self.seconds = self.at_end.seconds

    def train_step(self, images: Tensor, epoch: int, step_in_epoch: int) -> None:
        """Take one step; nothing in it waits for the device."""
        images = images.to(self.place.device, non_blocking=True)
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
        knn = self.evaluation.knn(self.model) if is_due else None
        loss, accuracy = self.at_end.means_since(self.at_epoch, self.place.world_size)
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "loss": loss,
            "pretext_accuracy": accuracy,
            "knn": knn,
            "lr": learning_rate(self.config, self.step - 1, self.batches.steps),
            "samples_per_second": self.at_end.speed_since(self.at_epoch, optim.batch_size),
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
        measured = config, self.model, self.images, self.views, self.place
        diverged = not (math.isfinite(last["loss"]) and is_finite(self.model))
        # What has no finite features has no leak that could be measured.
        leak = None if diverged else find_leak(*measured)
        scales = {} if diverged else find_stability(*measured)
        record: Record = {
            "bn": config.norm.bn,
            "seed": config.run.seed,
            "epochs": config.optim.epochs,
            "world_size": self.place.world_size,
            "groups": config.norm.groups,
            "blocks": config.norm.blocks,
            "offset": config.norm.offset,
            **leak_figures(leak),
            "knn": last["knn"],
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
        on_rank_0(self.place, lambda: journal.write_json(self.folder / RECORD, record))
        if self.journal is not None:
            self.journal.say(f"{CALL}: kNN {last['knn']:.4f}, {leak or 'it has diverged'}")
        return record

    def read(self, seconds: float) -> Mark:
        """Return how far the run is; waits for the device and for all ranks."""
        loss, accuracy = sum_over_ranks(self.place, self.totals)
        return Mark(self.step, loss, accuracy, seconds)

    def log_row(self, mark: Mark, epoch: int) -> None:
        """Add a row to steps.csv."""
        loss, accuracy = mark.means_since(self.at_row, self.place.world_size)
        row = {
            "step": self.step,
            "epoch": epoch + 1,
            "loss": loss,
            "pretext_accuracy": accuracy,
            "lr": learning_rate(self.config, self.step - 1, self.batches.steps),
            "samples_per_second": mark.speed_since(self.at_row, self.config.optim.batch_size),
        }
        self.at_row = mark
        if self.journal is not None:
            self.journal.on_window(row)

    def save(self, name: str) -> None:
        """Write a checkpoint of all ranks; all of them learn if it can't be written."""
        own = {
            "buffers": own_buffers(self.model),
            "random": get_random_state(self.place.device),
            "totals": self.totals,
        }
        everyones = gather_objects(self.place, to_cpu(own))

        def write() -> None:
            state = {
                "format": checkpoint.FORMAT,
                "config": to_dict(self.config),
                "versions": journal.versions(),
                "world_size": self.place.world_size,
                "device": self.place.device.type,
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

        on_rank_0(self.place, write)

    def restore(self, state: State) -> None:
        """Take everything from a checkpoint."""
        restore_model(self.model, state, self.place)
        self.optimizer.load_state_dict(state["optimizer"])
        own = state["ranks"][self.place.rank]
        self.totals.copy_(own["totals"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.step, self.curve = state["step"], state["curve"]
        self.best_knn, self.seconds = state["best_knn"], state["seconds"]
        self.at_epoch, self.at_row = (Mark(*mark) for mark in state["marks"])
        set_shuffle_state(state["shuffle"])
        set_random_state(own["random"], self.place.device)

    def leave(self, signum: int) -> None:
        """Stop where a checkpoint has just been written.

        Raises:
            Stopped: always.
        """
        name = signal.Signals(signum).name
        raise Stopped(
            signum,
            f"{CALL}: stopped by {name} after step {self.step} of {self.steps}, which is saved; "
            f"--resume --output {self.folder} goes on",
        )

    def close(self) -> None:
        """Let go of the screen and of log files."""
        if self.journal is not None:
            self.journal.close()
