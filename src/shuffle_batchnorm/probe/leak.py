"""The leak: how much better a network recognises its keys in the batch they are trained in."""

import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shuffle_batchnorm.comm import agreement, failures
from shuffle_batchnorm.comm.world import ProcessGroupLike, World, check_process_group, resolve
from shuffle_batchnorm.shuffle.state import set_shuffle_state

from . import checks
from .batches import Batch, Sizes, check_sizes, default_keys, draw_batch, find_hits, take
from .intervals import batch_interval
from .isolation import (
    all_modules,
    derive_seed,
    draw_seed,
    eager,
    find_roots,
    isolated,
    seed_all,
    shuffle_worlds,
)
from .leak_layers import Layers, check_patched
from .leak_report import LeakReport
from .patching import Rows, candidates
from .progress import Console
from .shapley import Coalition
from .verdict import ENOUGH

CALL = "measure_leak"
Encode = Callable[[Tensor], Tensor]


def measure_leak(
    encode_query: Encode,
    encode_key: Encode,
    images: Any,
    augment: Encode | None = None,
    queue: Tensor | None = None,
    *,
    batch_size: int,
    batches: int = 12,
    keys_per_batch: int | None = None,
    keys_per_pass: int = 1,
    modules: Iterable[nn.Module] = (),
    confidence: float = 0.95,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    by_layer: bool = False,
    process_group: ProcessGroupLike = None,
) -> LeakReport:
    r"""Measure how much of the pretext accuracy comes from the other samples of a key's batch.

    .. math:: \text{leak} = \text{top-1}(q_i, k_i \text{ as trained})
              - \text{top-1}(q_i, k_i \text{ in a fresh batch})

    Both terms take the same queries, and the same keys in the same augmentation. *As trained*:
    query and key batch hold the same images. *Fresh*: all other samples of the key batch, on all
    ranks, are replaced by images that are not in the batch; the key keeps its position. An encoder
    whose keys do not depend on the other samples has a leak of 0.

    A query scores if its dot product with its key is larger than with every negative; a tie is no
    hit. Features are taken as they come; normalise them in the callables if training does. The
    negatives are the `queue`, or, without one, the other keys measured in the same batch, encoded
    like the positive: as trained, or each in its own fresh batch.

    The callables are called in the mode they are in, without gradients, by all ranks equally often
    and in the same order, so they may communicate. Afterwards buffers, running statistics,
    training flags, offsets, shuffle states and random states are what they were, also after an
    error. Parameters are not watched.

    Communication:
        2 KiB from every rank to every rank at the start and once per batch, and what the callables
        do. Without a queue, the features of the keys measured; at the end, the hits.

    Args:
        encode_query: ``[N, *]`` to ``[N, D]``, a module or function, as in training.
        encode_key: ``[N, *]`` to ``[N, D]``.
        images: the pool, the same on all ranks: ``[M, *]``, or a data set of images or (image,
            label) of one shape. M is at least ``2 * batch_size - keys_per_pass``.
        augment: ``[N, *]`` to a view of it; it may use the random states of torch, Python and
            NumPy, which are seeded for each call. None for the images themselves.
        queue: negatives ``[K, D]``, which stay what they are.
        batch_size: S, the samples of all ranks in a training step; rank r takes the r-th part.
        batches: how many batches are drawn; 8 or more for an interval to rely on.
        keys_per_batch: how many keys are measured in each, at random positions; their passes are
            the cost. None for ``16 * keys_per_pass`` or what the batch has: 216 passes in all, and
            an interval that may be too wide: see ``docs/leak.md``.
        keys_per_pass: how many of these share a pass, evenly spread over the batch. 1 is exact
            for every encoder. More cost less, and are exact too while no two of them share a
            normaliser: up to G, a divisor of S, in `local` and `regroup`.
        modules: modules that the callables change and that can't be found in them. Found are
            modules, bound methods, ``functools.partial`` and what functions have in their closure.
        confidence: of the interval.
        resamples: how often the batches are resampled for it.
        generator: gives the seed of all that is drawn here, one number per call; seeded alike on
            all ranks. None for seed 0: every call takes the same images, so that encoders can
            be compared.
        progress: whether the first rank tells on stderr how far it is; None for: in a terminal
            only.
        by_layer: also measure through which modules of the key encoder the leak comes: Shapley
            values, whose players are found as in `audit`. Each pass in a fresh batch is repeated
            for 2^n coalitions; beyond 8 modules for about ``4 n``, others in each batch.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Returns:
        A `LeakReport`, the same on all ranks. Its interval resamples whole batches, see
        ``docs/leak.md``. If no feature of any key depends on the other samples, it is [0, 0].

    Warns:
        UserWarning: fewer than 8 batches, whose interval misses the true leak too often.

    Raises:
        TypeError: an argument of another type, features that are no floating-point tensor.
        ValueError: a size out of range or that does not fit the others; too few images; an encoder
            with batch norm layers in eval mode only, for then nothing would be measured; features
            that are not finite or of another shape; ranks that disagree.
        RuntimeError: on the peers of a rank that rejects its input or whose encoder fails; with
            `by_layer`, if keys depend on their batch through something outside all modules found.

    Source:
        The cheat: He et al. 2019, arXiv 1911.05722, section 3.3 and appendix A.9.

    Example:
        >>> from shuffle_batchnorm import ShuffleBatchNorm, measure_leak
        >>> encoder = nn.Sequential(nn.Linear(6, 16), ShuffleBatchNorm(16, mode="local", groups=8))
        >>> images, queue = torch.randn(64, 6), torch.randn(32, 16)
        >>> sizes = dict(batch_size=32, batches=8, keys_per_batch=8, keys_per_pass=8)
        >>> report = measure_leak(encoder, encoder, images, None, queue, **sizes)
        >>> report.leak == report.as_trained - report.fresh
        True
    """
    check_process_group(CALL, process_group)
    world = resolve(process_group, CALL)
    seed, error = draw_seed(generator), None
    if keys_per_batch is None:
        keys_per_batch = default_keys(batch_size, keys_per_pass)
    sizes = Sizes(0, batch_size, batches, keys_per_batch, keys_per_pass)
    terms: dict[str, object] = {}
    try:
        sizes = sizes._replace(pool=checks.length(CALL, images))
        check_sizes(CALL, sizes, world.size)
        checks.check_queue(CALL, queue, keys_per_batch)
        checks.check_interval(CALL, confidence, resamples)
        for name, encode in (("encode_query", encode_query), ("encode_key", encode_key)):
            checks.check_mode(CALL, name, all_modules(find_roots(encode)))
        terms = sizes._asdict() | {"confidence": confidence, "resamples": resamples, "seed": seed}
        terms["images"] = checks.describe(images)
        terms["queue"] = "None" if queue is None else str(list(queue.shape))
    except (TypeError, ValueError) as caught:
        error = caught
    agreement.agree(CALL, terms, error, world)

    sources = (encode_query, encode_key, augment)
    roots = [root for source in sources for root in find_roots(source)]
    used = all_modules([*roots, *modules]).values()
    fixed = None if queue is None else queue.detach().to("cpu", torch.float64, copy=True)
    worlds = shuffle_worlds(used, world)
    layers = Layers(used, worlds, world)
    probe = _Probe(encode_query, encode_key, images, augment, fixed, sizes, seed, world, layers)
    with torch.no_grad(), isolated(used, worlds), eager() if by_layer else nullcontext():
        set_shuffle_state((derive_seed(seed, "shuffle"), 0), world.group)
        if by_layer:
            probe.find_layers(candidates([*find_roots(encode_key), *modules]))
        numbers = Console(CALL, progress if world.rank == 0 else False).count("batch", batches)
        outcomes, parts = map(torch.stack, zip(*map(probe.measure, numbers), strict=True))
    means = checks.total(outcomes, world, CALL).mean(dim=2)
    trained, fresh, changed = means.unbind(dim=1)
    keys = batches * keys_per_batch
    standard_error, interval = 0.0, (0.0, 0.0)
    interval_of = functools.partial(
        batch_interval,
        keys=keys,
        confidence=confidence,
        resamples=resamples,
        seed=derive_seed(seed, "interval"),
    )
    if changed.any():
        standard_error, interval = interval_of(trained - fresh)
        if batches < ENOUGH and world.rank == 0:
            warnings.warn(
                f"{CALL}: {batches} batches are too few for the interval: below {ENOUGH} it misses "
                f"the true leak more often than its confidence of {100 * confidence:g} % says; "
                f"take batches={ENOUGH} or more",
                stacklevel=2,
            )
    as_trained, in_fresh = float(trained.mean()), float(fresh.mean())
    leak = as_trained - in_fresh
    found = as_trained, in_fresh, leak, standard_error, interval, confidence, keys, batches
    return LeakReport(*found, *layers.describe(parts, interval_of))


@dataclass(frozen=True)
class _Probe:
    """The arguments of one call, on one rank."""

    encode_query: Encode
    encode_key: Encode
    images: Any
    augment: Encode | None
    queue: Tensor | None  # [K, D], float64, on the CPU
    sizes: Sizes
    seed: int
    world: World
    layers: Layers

    def find_layers(self, modules: dict[str, nn.Module]) -> None:
        """Find the modules of the key encoder that mix samples, in the first batch."""
        batch = draw_batch(self.sizes, self.seed, 0)
        key_view = self._view(batch.images, 0, self.world.rank, "key")
        fresh_view = self._fresh_view(batch, 0, 0, key_view)
        encode = self._call(self.encode_key, 0, "encode_key")
        try:
            self.layers.find(
                modules, self._rows(batch, 0), lambda: encode(key_view), lambda: encode(fresh_view)
            )
        except Exception as error:
            failures.announce(self.world, f"{CALL}: {error}")
            raise

    def measure(self, number: int) -> tuple[Tensor, Tensor]:
        """Return what became of this rank's keys in one batch.

        That is: ``[3, keys]``, 0 for others' keys: hit as trained, hit in a fresh batch, features
        differ; and ``[layers]``, the parts of these keys' leak.
        """
        batch = draw_batch(self.sizes, self.seed, number)
        orders = derive_seed(self.seed, number, "orders")
        coalitions = self.layers.coalitions(orders)
        rows = batch.positions - self.world.rank * self._each
        own = ((rows >= 0) & (rows < self._each)).nonzero().flatten()
        try:
            found, refused = self._encode(batch, number, own, coalitions)
        except Exception as error:
            failures.announce(self.world, f"{CALL}: {error}")
            raise
        # Not before: the callables of all ranks may have to wait for one another.
        agreement.agree(CALL, {"features": found.shape[-1]}, refused, self.world)
        queries, trained, *passes = found
        of_own = own // self.sizes.keys_per_pass, slice(None), range(len(own))
        # [own, coalitions + 1, D]; the last is the fresh batch itself.
        in_fresh = torch.stack(passes).unflatten(0, (self.sizes.passes, -1))[of_own]
        hits = [self._hits(queries, trained, own)]
        hits += [self._hits(queries, keys, own) for keys in in_fresh.unbind(dim=1)]
        outcome = torch.zeros(3, self.sizes.keys, dtype=torch.float64, device="cpu")
        outcome[0, own], outcome[1, own] = hits[0], hits[-1]
        outcome[2, own] = (trained != in_fresh[:, -1]).any(dim=1).double()
        lost = [float((hits[0] - other).sum()) / self.sizes.keys for other in hits]
        everyone = coalitions[-1:]  # of which the fresh batch itself has the last word
        values = dict(zip([frozenset[int](), *coalitions, *everyone], lost, strict=False))
        return outcome, self.layers.parts(values, orders)

    def _encode(
        self, batch: Batch, number: int, own: Tensor, coalitions: list[Coalition]
    ) -> tuple[Tensor, Exception | None]:
        """Return features ``[2 + passes * (coalitions + 1), own, D]`` of this rank's keys.

        Queries, keys as trained, and for each pass: keys with coalitions of layers patched, keys.
        What is wrong with them is returned as well, after all calls, in place of an error.
        """
        rows = batch.positions[own] - self.world.rank * self._each
        width = None if self.queue is None else self.queue.shape[1]
        found: list[Tensor] = []
        refused: Exception | None = None

        def keep(name: str, output: object) -> None:
            nonlocal refused
            try:
                wanted = found[0].shape[1] if found else width
                found.append(checks.features(CALL, name, output, self._each, wanted)[rows])
            except (TypeError, ValueError) as caught:
                refused = refused or caught

        query_view = self._view(batch.images, number, self.world.rank, "query")
        keep("encode_query", self._call(self.encode_query, number, "encode_query")(query_view))
        key_view = self._view(batch.images, number, self.world.rank, "key")
        encode = self._call(self.encode_key, number, "encode_key")
        with self.layers.recording() as calls:
            output = encode(key_view)
        keep("encode_key", output)
        for k in range(self.sizes.passes):
            fresh_view = self._fresh_view(batch, number, k, key_view)
            runs = functools.partial(encode, key_view), functools.partial(encode, fresh_view)
            for patched in self.layers.patched(self._rows(batch, k), calls, *runs, coalitions):
                keep("encode_key", patched)
            keep("encode_key", encode(fresh_view))
            if self.layers.searched and refused is None:
                of_pass = own // self.sizes.keys_per_pass == k
                compared = found[-2 if coalitions else 1], found[-1], found[1]
                try:
                    check_patched(*(keys[of_pass] for keys in compared))
                except RuntimeError as caught:
                    refused = caught
        return (torch.empty(0, device="cpu") if refused else torch.stack(found)), refused

    def _call(self, encode: Encode, number: int, name: str) -> Encode:
        """Return the encoder with one seed for all passes: one with dropout drops alike in them."""

        def seeded(view: Tensor) -> Tensor:
            seed_all(derive_seed(self.seed, number, self.world.rank, name))
            return encode(view.clone())  # a copy, for an encoder may work in place

        return seeded

    def _fresh_view(self, batch: Batch, number: int, k: int, key_view: Tensor) -> Tensor:
        images = batch.fresh[k]
        are_keys = (self._local(images) == self._local(batch.images)).to(key_view.device)
        view = self._view(images, number, self.world.rank, k)
        return torch.where(are_keys.view(-1, *[1] * (key_view.ndim - 1)), key_view, view)

    def _rows(self, batch: Batch, k: int) -> Rows:
        """Return which of this rank's samples are the keys of a pass."""
        own = batch.positions.unflatten(0, (-1, self.sizes.keys_per_pass))[k]
        own = own - self.world.rank * self._each
        return Rows(self._each, own[(own >= 0) & (own < self._each)])

    @property
    def _each(self) -> int:
        return self.sizes.batch // self.world.size

    def _local(self, numbers: Tensor) -> Tensor:
        return numbers.chunk(self.world.size)[self.world.rank]

    def _view(self, numbers: Tensor, *parts: object) -> Tensor:
        images = take(self.images, self._local(numbers))
        if self.augment is None:
            return images
        seed_all(derive_seed(self.seed, *parts))
        view = self.augment(images)
        if not isinstance(view, Tensor) or view.ndim == 0 or len(view) != len(images):
            shape = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
            raise ValueError(
                f"{CALL}: augment must return a tensor of {len(images)} samples, got {shape}"
            )
        return view

    def _hits(self, queries: Tensor, keys: Tensor, own: Tensor) -> Tensor:
        if self.queue is not None:
            return find_hits(queries, keys, self.queue, None)
        negatives = keys.new_zeros(self.sizes.keys, keys.shape[1])
        negatives[own] = keys
        return find_hits(queries, keys, checks.total(negatives, self.world, CALL), own)
