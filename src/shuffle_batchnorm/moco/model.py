"""MoCo: a query encoder that learns, a key encoder that follows it, and a queue of keys."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shuffle_batchnorm.comm.world import ProcessGroupLike, World, check_process_group, resolve
from shuffle_batchnorm.norm.contexts import shuffle_offset, synchronize_running_stats
from shuffle_batchnorm.norm.modules import ShuffleBatchNorm

from .ranks.control import gather_rows

CALL = "MoCo"
_BUFFERS = ("own", "copy", "momentum")


class Step(NamedTuple):
    """What one step of `MoCo` gives.

    Attributes:
        loss: ``[]``, of this rank's samples; backward goes to the query encoder.
        accuracy: ``[]``, the share of queries whose positive key beats all negatives.
        queries: ``[N, dim]`` of the first view, detached.
        keys: ``[N, dim]`` of the second view.
    """

    loss: Tensor
    accuracy: Tensor
    queries: Tensor
    keys: Tensor


class MoCo(nn.Module):
    r"""Momentum contrast: tell a query's key from the keys of earlier steps.

    .. math::
        L = -\frac{1}{N} \sum_i \log \frac{\exp(q_i k_i / T)}
            {\exp(q_i k_i / T) + \sum_{j=1}^{K} \exp(q_i u_j / T)}

    with queries q of the first view, keys k of the second and the queue u. Before the keys are
    encoded, the key encoder's parameters move by :math:`\theta_k \leftarrow m \theta_k +
    (1 - m) \theta_q`; after the loss, the keys of all ranks replace the oldest in the queue, rank
    by rank, so that the queue is the same on all of them.

    ``symmetric`` also takes queries of the second view and keys of the first, against the same
    queue, and enqueues both sets of keys; the second pass of the keys has another offset.

    ``in_batch`` takes for u the keys of the other images in this step, of all ranks, as SimCLR
    does (arXiv 2002.05709), and leaves the queue as it is. What stays MoCo's: keys come from the
    momentum encoder and without gradient, and other queries are no negatives.

    Under DistributedDataParallel the gradient is that of the mean over all ranks' samples. Let it
    send no buffers: the queue is the same everywhere already, and running statistics are each
    rank's own. Where the key encoder's follow the query encoder's, these are first averaged over
    the ranks, so that all keys are normalised alike if they are normalised by them (EMAN).

    Communication: one all_gather of the keys, ``N * dim`` numbers per rank, twice that if
    symmetric; that of the encoders' layers; unless `buffers` are the key encoder's own, one
    all_reduce of the query encoder's running statistics.

    Args:
        encoder_q: images ``[N, *]`` to queries ``[N, dim]`` of unit length.
        encoder_k: the same network, with the batch norm for keys. It gets `encoder_q`'s values and
            is shut off from gradients.
        queue: K, any number from a step's keys of all ranks upwards.
        dim: of queries and keys.
        temperature: T.
        momentum: m, for parameters, and for buffers if they have ``"momentum"``.
        symmetric: average the loss over both directions.
        in_batch: negatives are the other keys of the step, not the queue.
        buffers: running statistics of the key encoder: its ``own``, a ``copy`` of the query
            encoder's mean over the ranks, or following this with ``momentum``.
        seed: of the queue's first content, random directions; the same on all ranks.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Raises:
        ValueError: `queue` or `dim` below 1, a `momentum` outside 0 to 1, a `temperature` that is
            not above 0, unknown `buffers`; when called, a queue smaller than the keys of a step,
            unless `in_batch`.

    Shape:
        Two views ``[N, *]`` to a `Step`. N is the same on all ranks.

    Source:
        He et al. 2019, arXiv 1911.05722, algorithm 1.

    Example:
        >>> encoder_q, encoder_k = (nn.Sequential(nn.Linear(6, 4), nn.Tanh()) for _ in "qk")
        >>> moco = MoCo(encoder_q, encoder_k, queue=32, dim=4)
        >>> step = moco(torch.randn(8, 6), torch.randn(8, 6))
        >>> step.loss.backward()
        >>> int(moco.queue_pointer)
        8
    """

    queue: Tensor
    queue_pointer: Tensor

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        *,
        queue: int = 1024,
        dim: int = 128,
        temperature: float = 0.1,
        momentum: float = 0.99,
        symmetric: bool = False,
        in_batch: bool = False,
        buffers: str = "own",
        seed: int = 0,
        process_group: ProcessGroupLike = None,
    ) -> None:
        super().__init__()
        _check_options(queue, dim, temperature, momentum, buffers)
        check_process_group(CALL, process_group)
        self.temperature, self.momentum = temperature, momentum
        self.symmetric, self.in_batch, self.buffers_follow = symmetric, in_batch, buffers
        self.process_group = process_group
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        encoder_k.load_state_dict(encoder_q.state_dict())
        encoder_k.requires_grad_(False)
        if buffers != "own":
            # Its own batches must not move the running statistics besides.
            for layer in encoder_k.modules():
                if isinstance(layer, _BatchNorm):
                    layer.momentum = 0.0
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(queue, dim, generator=generator), dim=1)
        self.register_buffer("queue", directions)
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, view_1: Tensor, view_2: Tensor) -> Step:
        """Encode both views, compare them, and enqueue the keys. See the class."""
        world = resolve(self.process_group, CALL)
        passes = 2 if self.symmetric else 1
        self._check_batch(len(view_1) * passes, world.size)
        self.update_key()
        # A copy, since the queue changes before the backward pass reads it.
        queue = self.queue.clone()
        queries = self.encoder_q(view_1)
        keys = self.encode_key(view_2)
        incoming = [self._gather(keys, world)]
        loss, accuracy = self.contrast(queries, keys, *self._negatives(incoming[0], queue, world))
        if self.symmetric:
            with self._another_offset(world):
                other_keys = self.encode_key(view_1)
            incoming.append(self._gather(other_keys, world))
            other_loss, other_accuracy = self.contrast(
                self.encoder_q(view_2), other_keys, *self._negatives(incoming[1], queue, world)
            )
            loss, accuracy = (loss + other_loss) / 2, (accuracy + other_accuracy) / 2
        if not self.in_batch:
            self._enqueue(torch.cat(incoming))
        return Step(loss, accuracy, queries.detach(), keys)

    @torch.no_grad()
    def encode_key(self, images: Tensor) -> Tensor:
        """Encode ``[N, *]`` to keys ``[N, dim]``, without gradient."""
        keys: Tensor = self.encoder_k(images)
        return keys

    def contrast(
        self, queries: Tensor, keys: Tensor, negatives: Tensor, own: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return loss ``[]`` and accuracy ``[]`` of ``[N, dim]`` twice against ``[K, dim]``.

        A tie of the positive with a negative is no hit: a collapsed encoder scores 0, not 1.

        Args:
            queries: ``[N, dim]``.
            keys: ``[N, dim]``.
            negatives: ``[K, dim]``.
            own: ``[N]``, where among the negatives each query's key is; None if it is not there.
        """
        # bfloat16 can't tell similarities apart once they are divided by T.
        wide = torch.promote_types(queries.dtype, torch.float32)
        queries, keys, negatives = (t.to(wide) for t in (queries, keys, negatives))
        with torch.autocast(queries.device.type, enabled=False):
            positive = (queries * keys).sum(1, keepdim=True)
            negative = queries @ negatives.T
            if own is not None:
                negative = negative.scatter(1, own.unsqueeze(1), -math.inf)
            logits = torch.cat([positive, negative], dim=1) / self.temperature
            target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            loss = F.cross_entropy(logits, target)
            hits = positive.detach().squeeze(1) > negative.detach().amax(1)
        return loss, hits.to(loss.dtype).mean()

    @torch.no_grad()
    def update_key(self) -> None:
        """Move the key encoder towards the query encoder: parameters, and buffers as chosen.

        It comes before the queries' pass, so that keys know nothing of the batch they are in
        through the running statistics.
        """
        follow = get_ema_multi_avg_fn(self.momentum)
        query, key = list(self.encoder_q.parameters()), list(self.encoder_k.parameters())
        if query:
            follow(key, query, None)
        if self.buffers_follow == "own":
            return
        synchronize_running_stats(self.encoder_q, self.process_group)
        pairs = zip(self.encoder_k.buffers(), self.encoder_q.buffers(), strict=True)
        for key_buffer, query_buffer in pairs:
            if self.buffers_follow == "momentum" and key_buffer.is_floating_point():
                key_buffer.lerp_(query_buffer, 1 - self.momentum)
            else:
                key_buffer.copy_(query_buffer)

    def _negatives(
        self, everyones: Tensor, queue: Tensor, world: World
    ) -> tuple[Tensor, Tensor | None]:
        """Return the negatives ``[K, dim]``, and where among them this rank's keys are."""
        if not self.in_batch:
            return queue, None
        positions = torch.arange(len(everyones), device=everyones.device)
        return everyones, positions.chunk(world.size)[world.rank]

    def _gather(self, keys: Tensor, world: World) -> Tensor:
        """Return the keys of all ranks, ``[W * N, dim]``, in rank order."""
        keys = keys.to(self.queue.dtype)
        if world.size == 1:
            return keys
        return gather_rows(keys, world)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        length, count = len(self.queue), len(keys)
        # Slots by arithmetic on the device: the pointer's value is never read by the host.
        slots = (self.queue_pointer + torch.arange(count, device=keys.device)) % length
        self.queue.index_copy_(0, slots, keys)
        self.queue_pointer.copy_((self.queue_pointer + count) % length)

    def _another_offset(self, world: World) -> AbstractContextManager[None]:
        """Normalise the second keys with other groups than the first, if the mode has an offset."""
        layers = [m for m in self.encoder_k.modules() if isinstance(m, ShuffleBatchNorm)]
        moving = [layer for layer in layers if layer.mode in ("swap", "regroup")]
        if not moving:
            return nullcontext()
        first = moving[0]
        return shuffle_offset(self.encoder_k, next_offset(first.offset, world.size * first.groups))

    def _check_batch(self, count: int, world_size: int) -> None:
        if not self.in_batch and len(self.queue) < count * world_size:
            raise ValueError(
                f"{CALL}: queue {len(self.queue)} is smaller than the {world_size} ranks x "
                f"{count} = {count * world_size} keys of a step"
            )


def next_offset(offset: int, total: int) -> int:
    """Return the next offset for which `regroup` never lets samples of one group meet again.

    Args:
        offset: one that is in use.
        total: G.

    Returns:
        The next larger number without a common divisor with G that means another offset; the one
        given if there is none, or if it is 0, which turns shuffling off.

    Example:
        >>> next_offset(1, 32), next_offset(1, 2), next_offset(0, 32)
        (3, 1, 0)
    """
    if offset == 0:
        return 0
    others = range(offset + 1, offset + total)
    return next((other for other in others if math.gcd(other, total) == 1), offset)


def _check_options(queue: int, dim: int, temperature: float, momentum: float, buffers: str) -> None:
    for name, value in (("queue", queue), ("dim", dim)):
        if value < 1:
            raise ValueError(f"{CALL}: {name} must be at least 1, got {value}")
    if not temperature > 0:
        raise ValueError(f"{CALL}: temperature must be above 0, got {temperature}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{CALL}: momentum must be from 0 to 1, got {momentum}")
    if buffers not in _BUFFERS:
        raise ValueError(f"{CALL}: buffers must be one of {', '.join(_BUFFERS)}, got {buffers!r}")
