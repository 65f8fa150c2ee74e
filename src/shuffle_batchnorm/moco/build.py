"""From a configuration to a model, and from loaded images to what it takes."""

import inspect
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from shuffle_batchnorm.norm.convert import FilterFn
from shuffle_batchnorm.norm.modules import ShuffleBatchNorm
from shuffle_batchnorm.shuffle.encoder import ShuffledEncoder

from .config import CALL, Config, NormConfig
from .data.augmentation import make_augmentation, step_random_state
from .data.images import Images
from .model import MoCo
from .networks import NetworkError, make_encoder
from .ranks.control import average_in_rank_order
from .ranks.launch import Rank

_IMAGES = 256  # whose statistics averages begin with


def build_model(config: Config, images: Images, device: torch.device) -> MoCo:
    """Build the model of a run, with the weights that it begins with.

    Args:
        config: the run.
        images: its data set, for channels and size.
        device: where the model will be.

    Returns:
        A `MoCo` in training mode; weights and queue follow from the seed.

    Raises:
        NetworkError: there is no such network, or it can't be converted.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.run.seed)
        sizes = images.channels, images.image_size
        encoder_q = normalise_query(make_encoder(config.network, *sizes), config.norm)
        encoder_k = normalise_key(make_encoder(config.network, *sizes), config.norm)
    options = asdict(config.moco)
    if config.norm.bn == "eman":
        options["buffers"] = "momentum"
    model = MoCo(
        encoder_q,
        encoder_k,
        dim=config.network.dim,
        in_batch=not config.norm.has_queue,
        seed=config.run.seed,
        **options,
    )
    model.to(device, torch.float64 if config.run.precision == "float64" else torch.float32)
    if config.run.channels_last:
        # Only what has four axes has channels to put last.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.norm.bn == "eman":
        begin_averages(model, Views(config, images, Rank(0, 1, device)).some(_IMAGES))
    if config.run.compile:
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.compile()
    return model


@torch.no_grad()
def begin_averages(model: MoCo, images: Tensor) -> None:
    """Let running statistics begin with those of some images, in place of means 0 and variances 1.

    Averages with a momentum of 0.99 need hundreds of steps to forget these, and a short training
    did not recover from them (docs/trainer.md).

    Communication: none; the images are the same on all ranks.

    Args:
        model: changed in place.
        images: ``[N, c, H, H]``, as the query encoder takes them.
    """
    layers = [m for m in model.encoder_q.modules() if isinstance(m, ShuffleBatchNorm)]
    before = [(layer.momentum, layer.groups) for layer in layers]
    for layer in layers:
        layer.momentum, layer.groups = 1.0, 1
    model.encoder_q(images)
    for layer, (momentum, groups) in zip(layers, before, strict=True):
        layer.momentum, layer.groups = momentum, groups
    model.encoder_k.load_state_dict(model.encoder_q.state_dict())


class AveragedBatchNorm(ShuffleBatchNorm):
    """Batch norm by its running statistics, also in training mode: for EMAN's key encoder.

    Communication: none. Who uses it lets the running statistics follow those of another layer.

    Source:
        Cai et al. 2021, arXiv 2101.08482.

    Example:
        >>> layer = AveragedBatchNorm(3).train()
        >>> layer.training
        False
    """

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in eval mode, whatever the model is told."""
        return super().train(False)


def normalise_query(encoder: nn.Module, norm: NormConfig) -> nn.Module:
    """Give the query encoder its batch norm: of each group, or ``sync`` where the keys have it.

    Communication: none here; that of mode ``sync`` in its layers.

    Args:
        encoder: with ``nn.BatchNorm`` layers; changed in place.
        norm: the mode of the keys, and how many groups there are on each rank.

    Returns:
        The encoder.

    Raises:
        NetworkError: a kind of batch norm that can't be converted, or none at all.

    Example:
        >>> normalise_query(nn.BatchNorm2d(3), NormConfig(bn="regroup", groups=16)).mode
        'local'
    """
    return _convert(encoder, norm, "sync" if norm.is_global else "local")


def normalise_key(encoder: nn.Module, norm: NormConfig) -> nn.Module:
    """Give the key encoder the batch norm that ``--bn`` names.

    Communication: none here. ``batch-shuffle`` moves samples and features at every call, the
    others rows of statistics in every layer, ``local`` and ``eman`` nothing.

    Args:
        encoder: with ``nn.BatchNorm`` layers; changed in place.
        norm: mode, groups on each rank, blocks and offset; names of the layers that have this
            mode, while the others have ``local``.

    Returns:
        The encoder; for ``batch-shuffle`` inside a `ShuffledEncoder`, with groups of its own, so
        that one rank can shuffle among its virtual groups.

    Raises:
        NetworkError: a kind of batch norm that can't be converted, none at all, or a name among the
            layers that is none's.

    Example:
        >>> normalise_key(nn.BatchNorm2d(3), NormConfig(bn="regroup", groups=16)).mode
        'regroup'
    """
    if norm.bn == "batch-shuffle":
        return ShuffledEncoder(_convert(encoder, norm, "local"))
    if norm.bn == "eman":
        return _convert(encoder, norm, "local", AveragedBatchNorm).train()
    if norm.layers is not None:
        chosen = _find_layers(encoder, norm.layers)
        encoder = _convert(encoder, norm, "local")
        return _convert(encoder, norm, norm.bn, filter_fn=lambda _, name: name in chosen)
    return _convert(encoder, norm, "sync" if norm.is_global else norm.bn)


def _find_layers(encoder: nn.Module, names: str) -> set[str]:
    """Return the batch norm layers that ``--layers`` names."""
    known = [name for name, module in encoder.named_modules() if isinstance(module, _BatchNorm)]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise NetworkError(
                f"{CALL}: --layers: {name!r} is no batch norm layer; there are {', '.join(known)}"
            )
    return set(chosen)


def _convert(
    encoder: nn.Module,
    norm: NormConfig,
    mode: str,
    kind: type[ShuffleBatchNorm] = ShuffleBatchNorm,
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    if not any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise NetworkError(f"{CALL}: --network has no batch norm layer, so --bn would do nothing")
    how: dict[str, Any] = dict(groups=norm.groups, offset=norm.offset, blocks=norm.blocks)
    try:
        return kind.convert_shuffle_batchnorm(encoder, mode=mode, filter_fn=filter_fn, **how)
    except TypeError as error:
        raise NetworkError(f"{CALL}: --bn {norm.bn}: {error}") from error


def parallelise(model: MoCo, rank: Rank) -> nn.Module:
    """Return the model, for several ranks in DistributedDataParallel.

    Communication: one broadcast of all weights and buffers; in every backward pass an all_reduce
    of the gradients.
    """
    if rank.world_size == 1:
        return model
    # Running statistics are each rank's own. torch 2.13 has another name for it.
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    options: dict[str, Any] = {new if new in names else old: False}
    if rank.device.type == "cuda":
        options["device_ids"] = [rank.device]
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    if rank.device.type == "cpu" and rank.world_size > 2:
        parallel.register_comm_hook(None, average_in_rank_order)
    return parallel


class Views:
    """Loaded images ``[N, c, H, H]``, as they are, to what an encoder takes.

    Args:
        config: the run.
        images: its data set.
        rank: this rank.
    """

    def __init__(self, config: Config, images: Images, rank: Rank) -> None:
        self.config, self.images, self.rank = config, images, rank

        def make(policy: str) -> nn.Module:
            name, size = config.data.dataset, images.image_size
            return make_augmentation(name, size, policy, images.mean, images.std).to(rank.device)

        self.augmentation, self.plain = make(config.data.augment), make("none")

    def augmented(self, images: Tensor) -> Tensor:
        """Return a random view, by the random state of the moment."""
        return self._prepared(self.augmentation(images))

    def of_step(self, images: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the two views of a training step, which follow from its number alone."""
        seed, index = self.config.run.seed, self.rank.index
        views = []
        for number in (0, 1):
            with step_random_state(seed, epoch, step, index, number):
                views.append(self.augmented(images))
        return views[0], views[1]

    def as_they_are(self, images: Tensor) -> Tensor:
        """Return the images, only normalised, for evaluation."""
        return self._prepared(self.plain(images))

    def some(self, count: int) -> Tensor:
        """Return images from all over the training part, as they are; all, if there are fewer."""
        train = self.images.train
        total = len(train)  # type: ignore[arg-type]
        count = min(count, total)
        found = [train[k * total // count][0] for k in range(count)]
        return self.as_they_are(torch.stack(found).to(self.rank.device))

    def _prepared(self, images: Tensor) -> Tensor:
        if self.config.run.precision == "float64":
            images = images.double()
        if self.config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images

    def autocast(self) -> Any:
        """Return a context for the networks' arithmetic, as --precision wants it."""
        is_bf16 = self.config.run.precision == "bf16"
        return torch.autocast(self.rank.device.type, torch.bfloat16, enabled=is_bf16)
