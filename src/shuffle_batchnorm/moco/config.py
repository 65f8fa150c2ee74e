"""What a run is: the flags of the command line, their defaults, and which of them go together.

Every field is a flag: ``batch_size`` is ``--batch-size``. The text below a field is its help.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .ranges import Range

Norm = Literal["local", "sync", "swap", "regroup", "batch-shuffle", "eman", "simclr"]
Dataset = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder"]
Augment = Literal["standard", "none"]
Stem = Literal["auto", "cifar", "imagenet"]
Buffers = Literal["own", "copy", "momentum"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "float64"]

CALL = "train"
LEAK_BATCHES, LEAK_KEYS = 32, 32  # batches that the leak is measured with; keys in each
IMAGE_SIZES = {
    "digits": 16, "fashion-mnist": 28, "cifar10": 32, "cifar100": 32, "imagefolder": 224,
}  # fmt: skip
# Data sets that are found without --data-path: in scikit-learn, or where a package puts them.
FOUND = ("digits", "fashion-mnist")


class UserError(ValueError):
    """What a user can fix; the message is one line."""


class ConfigError(UserError):
    """A configuration that can't be trained; the message names the flag."""


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    dataset: Dataset = "digits"
    """Images to train on; digits come with scikit-learn, fashion-mnist with Debian's package
    dataset-fashion-mnist or from --data-path, the others from --data-path."""
    data_path: Path | None = None
    """Folder or archive of the data set, as its authors give it out."""
    image_size: int | None = None
    """Side of the views in pixels (default: 16 for digits, 28 for fashion-mnist, 32 for cifar, 224
    for imagefolder)."""
    workers: int = 0
    """Processes per rank that read images; 0 reads in the rank itself."""
    augment: Augment = "standard"
    """Random views of an image, or twice the image itself."""
    validation: bool = False
    """Hold out every sixth training image in place of the test images, to choose settings by."""

    @property
    def side(self) -> int:
        """The side of the views in pixels, with the data set's default."""
        return IMAGE_SIZES[self.dataset] if self.image_size is None else self.image_size


@dataclass(frozen=True)
class NetworkConfig:
    """What is trained."""

    network: str = "small"
    """small, resnet18, resnet50, timm/NAME or torchvision/NAME."""
    depth: int = 4
    """Convolutions of --network small, each with batch norm."""
    stem: Stem = "auto"
    """First layers of a ResNet: for small images or for large ones; auto goes by --image-size."""
    dim: int = 128
    """Numbers per embedding."""
    mlp: bool = True
    """Head of two layers instead of one (MoCo v2)."""


@dataclass(frozen=True)
class NormConfig:
    """Whose batch statistics normalise the keys."""

    bn: Norm = "regroup"
    """Batch norm of the key encoder; the query encoder's is local, or sync if this is sync. eman
    normalises keys by moving averages of the query encoder's statistics. simclr is sync with the
    other keys of a step as negatives, in place of the queue."""
    groups: int = 8
    """Virtual groups in each rank's batch; 1 is one group per rank, as in MoCo."""
    blocks: int = 8
    """Blocks that regroup cuts each group into: 1 / BLOCKS of a group stays together."""
    offset: int = 1
    """Groups that statistics travel, in swap and regroup."""
    layers: str | None = None
    """Batch norm layers of the key encoder, NAME,NAME,..., that swap and regroup are for; the
    others are local (default: all)."""

    @property
    def is_global(self) -> bool:
        """Whether all samples of a step normalise queries and keys."""
        return self.bn in ("sync", "simclr")

    @property
    def has_queue(self) -> bool:
        """Whether the negatives are keys of earlier steps; if not, they are those of this one."""
        return self.bn != "simclr"


@dataclass(frozen=True)
class MoCoConfig:
    """Momentum contrast."""

    queue: int = 1024
    """Keys of earlier steps that a query is told apart from; simclr has no use for them."""
    momentum: float = 0.99
    """Share of the key encoder that stays at each step."""
    temperature: float = 0.07
    """Divides the cosine similarities."""
    symmetric: bool = False
    """Use each view once as query and once as key."""
    buffers: Buffers = "own"
    """Running statistics of the key encoder: its own, copied, or averaged like the weights, as
    eman has them anyway."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD with a cosine schedule."""

    epochs: int = 60
    """Passes over the data."""
    batch_size: int = 256
    """Images per step, over all ranks."""
    lr: float = 0.12
    """Learning rate after the warm-up; it falls to 0 along a cosine, step by step."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of all weights."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises from 0, step by step."""
    accumulate: int = 1
    """Only 1: batch statistics and the queue see the micro-batch, so adding up isn't the same."""


@dataclass(frozen=True)
class RunConfig:
    """How and where it runs."""

    output: Path = Path("runs/moco")
    """Folder for checkpoints, logs and the record."""
    seed: int = 0
    """Of weights, order, views and queue."""
    ranks: int | None = None
    """Processes to start (default: one per GPU, or 1); torchrun decides itself."""
    device: Device = "auto"
    """Where to compute; auto takes GPUs if there are any."""
    precision: Precision = "fp32"
    """Of the networks' arithmetic; bf16 by autocast."""
    channels_last: bool = False
    """Store images with their channels side by side."""
    compile: bool = False
    """Compile the encoders with torch.compile."""
    resume: bool = False
    """Go on from OUTPUT/last.pt, if it is there."""
    save_every: int = 200
    """Steps between checkpoints; one is saved at the end and on SIGTERM and SIGINT anyway."""
    linear: bool = False
    """At the end, also train a linear classifier on the features, and write its accuracy down."""
    eval_every: int = 5
    """Epochs between kNN evaluations; the last epoch has one."""
    log_every: int = 10
    """Steps between rows of steps.csv, for each of which the loss is read."""
    tensorboard: bool = True
    """Also write TensorBoard's files, where it is installed."""


@dataclass(frozen=True)
class Config:
    """One run of the trainer.

    Example:
        >>> config = Config(norm=NormConfig(bn="local", groups=16))
        >>> config.optim.batch_size
        256
        >>> from_dict(to_dict(config)) == config
        True
    """

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


_ABOVE_0, _AT_LEAST_1 = Range(0, with_low=False), Range(1)
# Every other whole number is at least 1.
_RANGES = {
    "image_size": Range(8),
    "workers": Range(0),
    "offset": Range(-math.inf),
    "momentum": Range(0, 1),
    "temperature": _ABOVE_0,
    "batch_size": Range(2),
    "lr": _ABOVE_0,
    "sgd_momentum": Range(0, 1),
    "weight_decay": Range(0),
    "warmup_epochs": Range(0),
    "seed": Range(0, 2**31),
}
_PARTS = get_type_hints(Config)
# Choices are checked here too: a configuration need not come from the command line.
_CHOICES = {
    name: get_args(hint)
    for part in _PARTS.values()
    for name, hint in get_type_hints(part).items()
    if get_origin(hint) is Literal
}


def flag(name: str) -> str:
    """Return a field's flag.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return "--" + name.replace("_", "-")


def validate(config: Config, world_size: int) -> None:
    """Refuse a configuration that can't be trained on this many ranks.

    Args:
        config: the configuration.
        world_size: W, the number of ranks.

    Raises:
        ConfigError: one line that names the flag, its value and the rule.

    Example:
        >>> validate(Config(norm=NormConfig(groups=16), optim=OptimConfig(batch_size=250)), 2)
        Traceback (most recent call last):
        ...
        shuffle_batchnorm.moco.config.ConfigError: train: --batch-size 250 is not divisible by \
2 ranks x 16 groups = 32
    """
    for name, value in flat(config).items():
        valid = _RANGES.get(name, _AT_LEAST_1)
        if (name in _RANGES or type(value) is int) and value is not None and value not in valid:
            raise ConfigError(f"{CALL}: {flag(name)} must be {valid}, got {value}")
        if name in _CHOICES and value not in _CHOICES[name]:
            names = ", ".join(_CHOICES[name])
            raise ConfigError(f"{CALL}: {flag(name)} must be one of {names}, got {value}")
    data, optim = config.data, config.optim
    if data.dataset not in FOUND and data.data_path is None:
        raise ConfigError(f"{CALL}: --dataset {data.dataset} needs --data-path")
    if optim.accumulate != 1:
        raise ConfigError(
            f"{CALL}: --accumulate {optim.accumulate} would not train as a larger batch does: "
            "batch statistics and the queue see the micro-batch; use more ranks or --precision bf16"
        )
    if optim.warmup_epochs >= optim.epochs:
        raise ConfigError(
            f"{CALL}: --warmup-epochs {optim.warmup_epochs} leaves nothing of --epochs "
            f"{optim.epochs}"
        )
    views = 2 if config.moco.symmetric else 1
    if config.norm.has_queue and config.moco.queue < views * optim.batch_size:
        twice = "twice " if views == 2 else ""
        raise ConfigError(
            f"{CALL}: --queue {config.moco.queue} is smaller than {twice}--batch-size "
            f"{optim.batch_size}: it could not hold the keys of one step"
        )
    _validate_groups(config, world_size)


def _validate_groups(config: Config, world_size: int) -> None:
    norm, batch = config.norm, config.optim.batch_size
    total = world_size * norm.groups
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    product = f"{ranks} x {norm.groups} group{'s' if norm.groups > 1 else ''} = {total}"
    if batch % total:
        raise ConfigError(f"{CALL}: --batch-size {batch} is not divisible by {product}")
    if batch < 2 * total:
        raise ConfigError(
            f"{CALL}: --batch-size {batch} over {product} leaves 1 image per group; batch "
            "statistics need 2 or more"
        )
    if norm.bn == "eman" and config.moco.buffers == "copy":
        raise ConfigError(
            f"{CALL}: --bn eman averages the query encoder's statistics with --momentum, and "
            "--buffers copy would not"
        )
    if norm.layers is not None and norm.bn not in ("swap", "regroup"):
        raise ConfigError(f"{CALL}: --layers is for --bn swap and regroup, not {norm.bn}")
    if norm.is_global or norm.bn in ("local", "eman"):
        return
    if total < 2:
        raise ConfigError(
            f"{CALL}: --bn {norm.bn} needs 2 groups or more over all ranks, but --groups 1 on "
            "1 rank is one: use --groups 8, or more ranks"
        )
    if norm.bn != "batch-shuffle" and norm.offset % total == 0:
        raise ConfigError(
            f"{CALL}: --offset {norm.offset} goes round the {total} groups and ends where it "
            f"began: --bn {norm.bn} would do nothing"
        )
    if norm.bn == "regroup" and norm.blocks < 2:
        raise ConfigError(
            f"{CALL}: --blocks {norm.blocks} leaves every group together: --bn regroup needs 2 "
            "or more"
        )


def flat(config: Config) -> dict[str, Any]:
    """Return all fields by the names of their flags, with underscores; names are unique."""
    return {name: v for part in asdict(config).values() for name, v in part.items()}


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the configuration as JSON has it: nested dicts of str, numbers, bool and None."""
    return {
        part: {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
        for part, values in asdict(config).items()
    }


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the configuration that `to_dict` made this of; what is missing takes its default.

    Raises:
        ConfigError: a name that is no flag.
    """
    made: dict[str, Any] = {}
    for part, given in values.items():
        if part not in _PARTS:
            raise ConfigError(f"{CALL}: a configuration has no part {part!r}")
        unknown = sorted(set(given) - {field.name for field in fields(_PARTS[part])})
        if unknown:
            raise ConfigError(f"{CALL}: a configuration has no field {unknown[0]!r} in {part!r}")
        made[part] = _PARTS[part](**{name: _as_path(name, value) for name, value in given.items()})
    return Config(**made)


def _as_path(name: str, value: Any) -> Any:
    return Path(value) if name in ("data_path", "output") and value is not None else value
