"""Train a small CNN on digits while BatchNorm statistics travel between workers; print the check.

Two workers, each normalised with the other one's statistics:

    python main.py --gpu 0,1 --shuffle --epochs 10

The same swap inside one device, between two virtual groups of one batch:

    python main.py --gpu 0 --shuffle --groups 2

Started by torchrun, on one node or on several:

    torchrun --standalone --nproc-per-node 2 main.py --shuffle
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --master-port PORT main.py --shuffle
"""

import argparse
import contextlib
import os
import signal
import sys
from typing import NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from shuffle_batchnorm import ShuffleBatchNorm, record_statistics, synchronize_running_stats
from shuffle_batchnorm.moco.ranks.control import gather_objects
from shuffle_batchnorm.moco.ranks.launch import (
    Rank,
    find_device,
    launch,
    under_torchrun,
    world_size,
)
from shuffle_batchnorm.moco.ranks.spawn import Stopped, leave

RULE = "=" * 48


class Options(argparse.Namespace):
    """The command line, typed."""

    gpu: list[int]
    shuffle: bool
    mode: str
    groups: int
    offset: int
    epochs: int
    data: str
    batch_size: int
    lr: float
    seed: int


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def gpu_list(text: str) -> list[int]:
    """'0,1' -> [0, 1]."""
    names = text.split(",")
    if not all(name.isdecimal() for name in names) or len(set(map(int, names))) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different GPUs such as 0,1")
    return [int(name) for name in names]


def positive(text: str) -> int:
    """'3' -> 3, and at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def read_command_line() -> tuple[Options, TensorDataset, TensorDataset]:
    """The options and their data; what can be refused is refused here, before a worker starts."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
    modes = ["local", "sync", "swap", "regroup"]
    gpu_help = "a worker for each, on the CPU if not all exist (0,1; torchrun: one per worker)"
    data_help = "handwritten digits, even or odd; or noise with coin-flip labels (digits)"
    parser = Parser(prog="main.py", description="Train with shuffled BatchNorm statistics.")
    add = parser.add_argument
    add("--gpu", type=gpu_list, default=list(range(here)), metavar="0,1", help=gpu_help)
    add("--shuffle", action="store_true", help="convert the model's BatchNorm, else it stays plain")
    add("--mode", choices=modes, default="swap", help="whose statistics normalise whom (swap)")
    add("--groups", type=positive, default=1, help="virtual groups in each worker's batch (1)")
    add("--offset", type=int, default=1, help="how many groups further statistics go (1)")
    add("--epochs", type=positive, default=10, help="passes over the data (10)")
    add("--data", choices=["digits", "random"], default="digits", help=data_help)
    add("--batch-size", type=positive, default=32, help="images per worker and step (32)")
    add("--lr", type=float, default=0.05, help="learning rate of SGD (0.05)")
    add("--seed", type=int, default=0, help="of weights, split, order and noise (0)")
    options = parser.parse_args(namespace=Options())

    for flag in ("mode", "groups", "offset"):
        if getattr(options, flag) != parser.get_default(flag) and not options.shuffle:
            parser.error(f"argument --{flag}: needs --shuffle")
    if under_torchrun() and len(options.gpu) != here:
        parser.error(f"argument --gpu: names {len(options.gpu)}, but torchrun starts {here} here")
    size, groups = options.batch_size, options.groups
    if size % groups:
        parser.error(f"argument --batch-size: {size} is not divisible by --groups {groups}")
    if not 0 < options.lr < float("inf"):
        parser.error(f"argument --lr: {options.lr} is not a positive number")
    try:
        train, test = load_data(options.data, options.seed)
    except ImportError:
        hint = 'pip install ".[demo]" in the folder of this file, or use --data random'
        parser.error(f"argument --data: digits needs scikit-learn: {hint}")
    share = len(train) // world_size(len(options.gpu), "auto")
    if size > share:
        parser.error(f"argument --batch-size: {size} is more than each worker's {share} images")
    return options, train, test


def load_data(name: str, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Images [M, 1, 8, 8] with labels [M] in {0, 1}: to train on, and a fifth held out."""
    generator = torch.Generator().manual_seed(seed)
    if name == "digits":
        # Not at the top of the file: --data random works without scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
        images = (images - 4.9) / 6.0  # pixels go from 0 to 16, with this mean and deviation
        labels = torch.tensor(digits.target % 2, dtype=torch.float32)
    else:
        images = torch.randn(1797, 1, 8, 8, generator=generator)  # as many as there are digits
        labels = torch.randint(2, (1797,), generator=generator).float()
    test, train = torch.randperm(len(images), generator=generator).tensor_split([len(images) // 5])
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def make_model() -> nn.Module:
    """Images [N, 1, 8, 8] to one logit each [N, 1], through three BatchNorm layers."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 16, stride=1), *block(16, 32, stride=2), *block(32, 64, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))


def work(rank: Rank, options: Options, train: TensorDataset, test: TensorDataset) -> None:
    """Be one worker: train with the others, then print the accuracy."""
    torch.manual_seed(options.seed)
    model = make_model()
    if options.shuffle:
        model = ShuffleBatchNorm.convert_shuffle_batchnorm(
            model, mode=options.mode, groups=options.groups, offset=options.offset
        )
    model = model.to(rank.device)
    parallel = DistributedDataParallel(model) if rank.world_size > 1 else model
    optimizer = torch.optim.SGD(parallel.parameters(), lr=options.lr, momentum=0.9)
    # Disjoint shards of one size, dealt anew every epoch: a worker with more steps than the
    # others would wait for statistics that nobody sends.
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
        train, rank.world_size, rank.index, shuffle=True, seed=options.seed, drop_last=True
    )
    loader = DataLoader(train, options.batch_size, sampler=sampler, drop_last=True)

    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        with contextlib.ExitStack() as stack:
            last = epoch == options.epochs - 1
            records = stack.enter_context(record_statistics(model)) if last else []
            loss = train_epoch(parallel, loader, optimizer, rank.device)
        for record in records[:1]:  # the first BN layer, in this epoch's first step
            print_in_turn(rank, mean_lines(rank, "before", record.own_mean, options.groups))
            print_in_turn(rank, mean_lines(rank, "after", record.used_mean, options.groups))
        print_in_turn(rank, [f"[{epoch}/{options.epochs}] Loss {loss:.4f}", RULE])

    synchronize_running_stats(model, process_group=None)
    if rank.index == 0:
        share = accuracy(model, *(tensor.to(rank.device) for tensor in test.tensors))
        remark = "" if options.data == "digits" else ": noise has nothing to learn, expect 0.5"
        print(f"=> Accuracy {share:.4f} on {len(test)} held-out images{remark}", flush=True)


def train_epoch(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    """One pass over this worker's shard; returns its mean loss."""
    model.train()
    losses = []
    for images, labels in loader:
        logits = model(images.to(device)).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images [M, 1, 8, 8] that evaluation mode gives their label [M]."""
    model.eval()
    guesses: Tensor = (model(images).squeeze(1) > 0).float()
    return guesses.eq(labels).float().mean().item()


def mean_lines(rank: Rank, when: str, mean: Tensor, groups: int) -> list[str]:
    """Four channels of the mean [N, C] of this rank, or of its virtual groups if it has several."""
    rows = mean[:: len(mean) // groups, :4]  # each group's first sample
    names = [f"{rank.index}" + (f".{group}" if groups > 1 else "") for group in range(groups)]
    return [f"[{name}]mean {when} shuffle: {row}" for name, row in zip(names, rows, strict=True)]


def print_in_turn(rank: Rank, lines: list[str]) -> None:
    """Print every worker's lines in rank order; one process prints, so that none is cut in two."""
    everyones = gather_objects(rank, lines)
    print("".join(f"{line}\n" for lines in everyones for line in lines), end="", flush=True)


def main() -> None:
    """Start a worker for each GPU named, or be the one that torchrun has made of this process."""
    options, train, test = read_command_line()
    world = world_size(len(options.gpu), "auto")
    if os.environ.get("RANK", "0") == "0":
        verb = "Joining" if under_torchrun() else "Spawning"
        print(f"=> {verb} {world} distributed worker{'s' if world > 1 else ''}", flush=True)
        if find_device("auto", 0, len(options.gpu), options.gpu).type == "cpu":
            names = ",".join(map(str, options.gpu))
            print(f"=> GPU {names} not found: the workers run on the CPU, with gloo", flush=True)
    launch(work, options, train, test, ranks=world, gpus=options.gpu)
    if under_torchrun():
        leave(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Stopped as stopped:
        sys.exit(128 + stopped.signum)
    except Exception as error:
        message = " ".join(str(error).split())
        sys.exit(f"main.py: a worker failed: {type(error).__name__}: {message}")
