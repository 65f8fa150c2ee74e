"""From a configuration to a model, and from loaded images to what it takes."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import World, resolve

from .config import CALL, Config
from .data.augmentation import make_augmentation, step_random_state
from .data.images import Images
from .model import MoCo
from .networks import make_encoder
from .normalisation import normalise_key, normalise_query
from .ranks.launch import Place


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
    moco = config.moco
    model = MoCo(
        encoder_q,
        encoder_k,
        queue=moco.queue,
        dim=config.network.dim,
        temperature=moco.temperature,
        momentum=moco.momentum,
        symmetric=moco.symmetric,
        buffers=moco.buffers,
        seed=config.run.seed,
    )
    model.to(device, torch.float64 if config.run.precision == "float64" else torch.float32)
    if config.run.channels_last:
        # Only what has four axes has channels to put last.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.run.compile:
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.compile()
    return model


def parallelise(model: MoCo, place: Place) -> nn.Module:
    """Return the model, for several ranks in DistributedDataParallel.

    Communication: one broadcast of all weights and buffers; in every backward pass an all_reduce
    of the gradients.
    """
    if place.world_size == 1:
        return model
    # Running statistics are each rank's own. torch 2.13 has another name for it.
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    options: dict[str, Any] = {new if new in names else old: False}
    if place.device.type == "cuda":
        options["device_ids"] = [place.device]
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    if place.device.type == "cpu" and place.world_size > 2:
        parallel.register_comm_hook(resolve(None), _average_in_rank_order)
    return parallel


def _average_in_rank_order(
    world: World,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    """Average a bucket of gradients ``[K]`` over the ranks, always in the same order.

    gloo adds up in another order at every place of a bucket, and DistributedDataParallel deals the
    gradients to other buckets after the first step: a resumed run would differ in the last bits.

    Communication: each rank sends 1 / W of the bucket to every other, and gets as much back.
    """
    gradients, size = bucket.buffer(), world.size
    padded = F.pad(gradients, (0, -len(gradients) % size)).view(size, -1)
    ones = (1,) * size
    first, *others = collectives.exchange_samples(padded, ones, ones, world, CALL)
    total = first.clone()
    for other in others:
        total += other
    everyones = collectives.gather(total / size, world, CALL).view(-1)
    done: Future[Tensor] = Future()
    done.set_result(everyones[: len(gradients)])
    return done


class Views:
    """Loaded images ``[N, c, H, H]``, as they are, to what an encoder takes.

    Args:
        config: the run.
        images: its data set.
        place: this rank.
    """

    def __init__(self, config: Config, images: Images, place: Place) -> None:
        self.config, self.place = config, place

        def make(policy: str) -> nn.Module:
            name, size = config.data.dataset, images.image_size
            return make_augmentation(name, size, policy, images.mean, images.std).to(place.device)

        self.augmentation, self.plain = make(config.data.augment), make("none")

    def augmented(self, images: Tensor) -> Tensor:
        """Return a random view, by the random state of the moment."""
        return self._prepared(self.augmentation(images))

    def of_step(self, images: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the two views of a training step, which follow from its number alone."""
        seed, rank, device = self.config.run.seed, self.place.rank, self.place.device
        views = []
        for number in (0, 1):
            with step_random_state(seed, epoch, step, rank, number, device):
                views.append(self.augmented(images))
        return views[0], views[1]

    def as_they_are(self, images: Tensor) -> Tensor:
        """Return the images, only normalised, for evaluation."""
        return self._prepared(self.plain(images))

    def _prepared(self, images: Tensor) -> Tensor:
        if self.config.run.precision == "float64":
            images = images.double()
        if self.config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images

    def autocast(self) -> Any:
        """Return a context for the networks' arithmetic, as --precision wants it."""
        is_bf16 = self.config.run.precision == "bf16"
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=is_bf16)
