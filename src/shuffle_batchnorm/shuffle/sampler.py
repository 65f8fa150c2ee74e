"""ShuffledPairSampler: the shuffle by loading, so that no image crosses the network."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, Sampler

from shuffle_batchnorm.comm.world import ProcessGroupLike, check_process_group, resolve

from .permutations import DATA_SET, Key, make_route, permutation, samples_sent_to
from .plan import ShufflePlan

CALL = "ShuffledPairSampler"


class ShuffledPairSampler(Sampler[list[tuple[int, int]]]):
    r"""Let each rank load its queries, and as keys the samples a shuffle would have sent it.

    Position j of a rank's batch holds the query of sample :math:`x_j` and the key of sample
    :math:`x_{\pi(j)}`, with :math:`\pi` as in `batch_shuffle`. Encode both, and bring the keys'
    features to their queries with ``batch_unshuffle(features, sampler.plan(step))``. This is the
    input shuffle that costs nothing.

    It is the ``batch_sampler`` of a DataLoader over ``sampler.dataset``, whose items are pairs
    ``(dataset[query], dataset[key])``: a dataset that augments at random yields two views. A
    dataset of your own can take the pairs of indices that the sampler yields instead.

    Communication: none; every rank computes the same orders from `seed`. Unshuffling features of
    F numbers moves ``N * F`` numbers per rank, where `batch_shuffle` would have moved N images
    as well.

    Args:
        dataset: map-style, with ``__len__``; the same on all ranks.
        batch_size: N, samples per rank; every sample is read twice in an epoch, as query and key.
        seed: of the order of the samples and of the shuffles; the same on all ranks.
        shuffle: put the data set in a new order every epoch.
        drop_last: leave out the last, smaller batch; otherwise its samples are dealt to the ranks
            as evenly as they go, unless there are fewer than ranks.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.

    Yields:
        N pairs ``(query index, key index)`` per step.

    Raises:
        TypeError: `batch_size` or `seed` is not an int.
        ValueError: `batch_size` below 1, `seed` below 0 or above ``2**62``; and by the first
            `batch_unshuffle` of an epoch, on all ranks, if their samplers differ in an option, in
            length or in epoch.
        RuntimeError: used in another process group than it was made in, or made before there was
            one.

    Source:
        K. He in facebookresearch/moco issue 20.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from shuffle_batchnorm import ShuffledPairSampler, batch_unshuffle
        >>> sampler = ShuffledPairSampler(range(100, 112), batch_size=4)
        >>> loader = DataLoader(sampler.dataset, batch_sampler=sampler)
        >>> for step, (queries, keys) in enumerate(loader):
        ...     assert (batch_unshuffle(keys, sampler.plan(step)) == queries).all()
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        process_group: ProcessGroupLike = None,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{CALL}: {name} must be an int, got {value!r}")
            if not least <= value <= 2**62:
                raise ValueError(f"{CALL}: {name} must be from {least} to 2**62, got {value}")
        check_process_group(CALL, process_group)
        self.dataset = _Pairs(dataset)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.shuffle, self.drop_last = shuffle, drop_last
        # Workers get a copy of the dataset only, so a group may stay here.
        self._process_group = process_group
        self._world = resolve(process_group, CALL)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on all ranks, before the loader is iterated: another order.

        The first `batch_unshuffle` of an epoch compares the ranks' epochs and options.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        steps, left = divmod(len(self.dataset), self.batch_size * self._world.size)
        # A rank without a sample would have nothing to collate.
        return steps + (not self.drop_last and left >= self._world.size)

    def plan(self, step: int) -> ShufflePlan:
        """Return the plan of a step of this epoch, to give to `batch_unshuffle`."""
        self._check_world()
        if not 0 <= step < len(self):
            raise ValueError(f"{CALL}: step must be below {len(self)}, got {step}")
        key, sizes = self._key(step), self._sizes(step)
        route = make_route(key, sizes, self._world.rank)
        return ShufflePlan(self._world, sizes, key, route, f"epoch {self.epoch} of {self}")

    def __repr__(self) -> str:
        """Return the options that all ranks must have in common."""
        return (
            f"{CALL}({len(self.dataset)} samples, batch_size={self.batch_size}, seed={self.seed}, "
            f"shuffle={self.shuffle}, drop_last={self.drop_last})"
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's pairs of indices, step by step."""
        self._check_world()
        order = list(range(len(self.dataset)))
        if self.shuffle:
            order = permutation(Key(self.seed, self.epoch), DATA_SET, 0, len(order)).tolist()
        rank, start = self._world.rank, 0
        for step in range(len(self)):
            sizes = self._sizes(step)
            samples = order[start : start + sum(sizes)]
            start += sum(sizes)
            first = sum(sizes[:rank])
            queries = samples[first : first + sizes[rank]]
            keys = samples_sent_to(rank, self._key(step), sizes).tolist()
            yield [(query, samples[key]) for query, key in zip(queries, keys, strict=True)]

    def _check_world(self) -> None:
        """Raise unless the ranks are those for which the sampler was made."""
        world = resolve(self._process_group, CALL)
        if world != self._world:
            raise RuntimeError(
                f"{CALL}: made on rank {self._world.rank} of {self._world.size}, but this is rank "
                f"{world.rank} of {world.size}; make it after init_process_group"
            )

    def _key(self, step: int) -> Key:
        return Key(self.seed, self.epoch * len(self) + step)

    def _sizes(self, step: int) -> tuple[int, ...]:
        """Return every rank's batch size at a step."""
        size = self._world.size
        left = min(len(self.dataset) - step * self.batch_size * size, self.batch_size * size)
        return tuple((left + size - 1 - rank) // size for rank in range(size))


class _Pairs(Dataset[tuple[Any, Any]]):
    """Items ``(dataset[i], dataset[j])`` for pairs of indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Any, Any]:
        query, key = pair
        return self.dataset[query], self.dataset[key]
