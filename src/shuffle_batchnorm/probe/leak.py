"""The leak: how much better a network recognises its keys in the batch they are trained in."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shuffle_batchnorm.comm import agreement, failures
from shuffle_batchnorm.comm.world import ProcessGroupLike, World, check_process_group, resolve
from shuffle_batchnorm.shuffle.state import set_shuffle_state

from . import checks
from .batches import Batch, Sizes, check_sizes, draw_batch, find_hits, take
from .intervals import batch_interval
from .isolation import all_modules, derive_seed, find_roots, isolated, seed_all, shuffle_worlds
from .progress import count_batches

CALL = "measure_leak"
ENOUGH = 8  # batches for an interval that covers at its rate; measured in docs/leak.md
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LeakReport:
    """What `measure_leak` found, the same on all ranks; accuracies are between 0 and 1.

    Attributes:
        as_trained: top-1 pretext accuracy of keys in the batch they are trained in.
        fresh: that of the same keys in fresh batches.
        leak: the first minus the second.
        standard_error: of the leak.
        interval: bootstrap interval of the leak.
        confidence: of the interval.
        keys: how many keys were measured.
        batches: in how many batches.
    """

    as_trained: float
    fresh: float
    leak: float
    standard_error: float
    interval: tuple[float, float]
    confidence: float
    keys: int
    batches: int

    def __str__(self) -> str:
        """Return the report in one line."""
        low, high = self.interval
        return (
            f"leak {self.leak:.3f} ± {self.standard_error:.3f} ({100 * self.confidence:g} % "
            f"interval {low:.3f} to {high:.3f}): top-1 {self.as_trained:.3f} as trained, "
            f"{self.fresh:.3f} in a fresh batch; {self.keys} keys in {self.batches} batches"
        )


def measure_leak(
    encode_query: Encode,
    encode_key: Encode,
    images: Any,
    augment: Encode | None = None,
    queue: Tensor | None = None,
    *,
    batch_size: int,
    batches: int = 32,
    keys_per_batch: int = 32,
    keys_per_pass: int = 1,
    modules: Iterable[nn.Module] = (),
    confidence: float = 0.95,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
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
        keys_per_batch: how many keys are measured in each, at random positions. Their passes are
            the cost: see ``docs/leak.md``.
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
        progress: whether the first rank writes on stderr which batch it is; None for: in a
            terminal only.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Returns:
        A `LeakReport`, the same on all ranks. Its interval resamples whole batches: see
        ``docs/leak.md``. If no feature of any key depends on the other samples, it is [0, 0].

    Warns:
        UserWarning: fewer than 8 batches, whose interval misses the true leak too often.

    Raises:
        TypeError: an argument of another type, features that are no floating-point tensor.
        ValueError: a size out of range or that does not fit the others; too few images; an encoder
            with batch norm layers in eval mode only, for then nothing would be measured; features
            that are not finite or of another shape; ranks that disagree.
        RuntimeError: on the peers of a rank that rejects its input or whose encoder fails.

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
    seed, error = 0, None
    if generator is not None:
        # Drawn before anything can fail, so that the ranks' generators stay in step.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
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
    probe = _Probe(encode_query, encode_key, images, augment, fixed, sizes, seed, world)
    with torch.no_grad(), isolated(used, shuffle_worlds(used, world)):
        set_shuffle_state((derive_seed(seed, "shuffle"), 0), world.group)
        numbers = count_batches(CALL, batches, progress if world.rank == 0 else False)
        outcomes = torch.stack([probe.measure(number) for number in numbers])
    means = checks.total(outcomes, world, CALL).mean(dim=2)
    trained, fresh, changed = means.unbind(dim=1)
    keys = batches * keys_per_batch
    standard_error, interval = 0.0, (0.0, 0.0)
    if changed.any():
        drawn = derive_seed(seed, "interval")
        standard_error, interval = batch_interval(
            trained - fresh, keys, confidence=confidence, resamples=resamples, seed=drawn
        )
        if batches < ENOUGH and world.rank == 0:
            warnings.warn(
                f"{CALL}: {batches} batches are too few for the interval: below {ENOUGH} it misses "
                f"the true leak more often than its confidence of {100 * confidence:g} % says; "
                f"take batches={ENOUGH} or more",
                stacklevel=2,
            )
    as_trained, in_fresh = float(trained.mean()), float(fresh.mean())
    leak = as_trained - in_fresh
    return LeakReport(
        as_trained, in_fresh, leak, standard_error, interval, confidence, keys, batches
    )


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

    def measure(self, number: int) -> Tensor:
        """Return what became of this rank's keys in one batch: ``[3, keys]``, 0 for others' keys.

        The rows: hit as trained, hit in a fresh batch, features differ.
        """
        batch = draw_batch(self.sizes, self.seed, number)
        rows = batch.positions - self.world.rank * self._each
        own = ((rows >= 0) & (rows < self._each)).nonzero().flatten()
        try:
            found, refused = self._encode(batch, number, rows[own])
        except Exception as error:
            failures.announce(self.world, f"{CALL}: {error}")
            raise
        # Not before: the callables of all ranks may have to wait for one another.
        agreement.agree(CALL, {"features": found.shape[-1]}, refused, self.world)
        queries, trained, *passes = found
        in_fresh = torch.stack(passes)[own // self.sizes.keys_per_pass, range(len(own))]
        outcome = torch.zeros(3, self.sizes.keys, dtype=torch.float64, device="cpu")
        outcome[0, own] = self._hits(queries, trained, own)
        outcome[1, own] = self._hits(queries, in_fresh, own)
        outcome[2, own] = (trained != in_fresh).any(dim=1).double()
        return outcome

    def _encode(self, batch: Batch, number: int, rows: Tensor) -> tuple[Tensor, Exception | None]:
        """Return features ``[2 + passes, rows, D]``: queries, keys as trained, keys of each pass.

        What is wrong with them is returned as well, after all calls, in place of an error.
        """
        parts = (number, self.world.rank)
        width = None if self.queue is None else self.queue.shape[1]
        found: list[Tensor] = []
        refused: Exception | None = None

        def call(name: str, encode: Encode, view: Tensor) -> None:
            nonlocal refused
            # One seed for all passes: an encoder with dropout drops alike in them.
            seed_all(derive_seed(self.seed, *parts, name))
            output = encode(view)
            try:
                wanted = found[0].shape[1] if found else width
                features = checks.features(CALL, name, output, self._each, wanted)
                found.append(features[rows])
            except (TypeError, ValueError) as caught:
                refused = refused or caught

        call("encode_query", self.encode_query, self._view(batch.images, *parts, "query"))
        key_view = self._view(batch.images, *parts, "key")
        # A copy, for an encoder may work in place.
        call("encode_key", self.encode_key, key_view.clone())
        for k, images in enumerate(batch.fresh):
            are_keys = (self._local(images) == self._local(batch.images)).to(key_view.device)
            fresh_view = self._view(images, *parts, k)
            columns = are_keys.view(-1, *[1] * (key_view.ndim - 1))
            call("encode_key", self.encode_key, torch.where(columns, key_view, fresh_view))
        return (torch.empty(0, device="cpu") if refused else torch.stack(found)), refused

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
