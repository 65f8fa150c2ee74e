"""The data sets by name, and the order in which their images come."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from shuffle_batchnorm.moco.config import CALL, DataConfig, UserError
from shuffle_batchnorm.moco.ranks.spawn import start_tracker
from shuffle_batchnorm.shuffle.permutations import DATA_SET, Key, permutation

from .cifar import read_cifar
from .fashion_mnist import CLASSES, read_fashion_mnist
from .folders import read_folders
from .images import ArrayImages, DataError, Images, resized

_VALIDATION = 6  # of so many training images, one is held out to choose settings by
_VALIDATING = "--validation: scores are of training images that are held out, not of test images"
_MEAN_AND_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def load_data(config: DataConfig) -> Images:
    """Load a data set.

    Args:
        config: ``digits`` is scikit-learn's, of which every fifth image of a class is held out;
            the others are read from `data_path`. With `validation`, every sixth image of the
            training part is held out instead of the test part, which is not looked at.

    Returns:
        The images; those of ``digits``, Fashion-MNIST and CIFAR are in memory.

    Raises:
        DataError: a missing or wrong `data_path`, an archive that is damaged or another one.

    Example:
        >>> images = load_data(DataConfig(dataset="digits"))
        >>> len(images.train), len(images.test), images.train[0][0].shape
        (1438, 359, torch.Size([1, 16, 16]))
    """
    images = _load(config)
    if not config.validation:
        return images
    numbers = range(len(images.train))  # type: ignore[arg-type]
    kept = [number for number in numbers if number % _VALIDATION]
    return replace(
        images,
        train=Subset(images.train, kept),
        test=Subset(images.train, numbers[::_VALIDATION]),
        # What is said of several classes is of those among the test images.
        remarks=(*(images.remarks if images.classes < 2 else ()), _VALIDATING),
    )


def _load(config: DataConfig) -> Images:
    if config.dataset == "digits":
        return _load_digits(config.side)
    path = config.data_path
    if config.dataset == "fashion-mnist":
        return _in_memory(*read_fashion_mnist(path), CLASSES, config.side)
    if path is None:
        raise DataError(
            f"{CALL}: --dataset {config.dataset} needs --data-path, {_WHAT[config.dataset]}"
        )
    if not path.exists():
        raise DataError(f"{CALL}: --data-path {path} does not exist; it is {_WHAT[config.dataset]}")
    mean, std = _MEAN_AND_STD[config.dataset]
    train: Dataset[Any]
    test: Dataset[Any]
    remarks: list[str] = []
    if config.dataset == "imagefolder":
        train, test, remarks = folders = read_folders(path, config.side)
        classes = len(folders[0].classes)
    else:
        *parts, classes = read_cifar(config.dataset, path)
        train, test = (ArrayImages(resized(p.images, config.side), p.labels) for p in parts)
    return Images(train, test, classes, 3, config.side, mean, std, tuple(remarks))


_WHAT = {
    "cifar10": "the folder that holds cifar-10-python.tar.gz",
    "cifar100": "the folder that holds cifar-100-python.tar.gz",
    "imagefolder": "the folder that holds train/<class> and val/<class>",
}


def _load_digits(side: int) -> Images:
    # Not at the top: the other data sets do without it.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = torch.tensor(bunch.images).unsqueeze(1) / 16.0  # [1797, 1, 8, 8], were 0 to 16
    labels = torch.tensor(bunch.target)
    images = resized((pixels * 255).round().to(torch.uint8), side)
    # Sorted by label and then every fifth: the same share of every class, and no random numbers.
    order = labels.argsort(stable=True)
    held_out = torch.zeros(len(order), dtype=torch.bool)
    held_out[order[2::5]] = True
    train = ArrayImages(images[~held_out], labels[~held_out])
    test = ArrayImages(images[held_out], labels[held_out])
    return _in_memory(train, test, len(bunch.target_names), side)


def _in_memory(train: ArrayImages, test: ArrayImages, classes: int, side: int) -> Images:
    """Return grey images with another side, and mean and deviation of those to train on."""
    train, test = (ArrayImages(resized(part.images, side), part.labels) for part in (train, test))
    values = train.images.double() / 255
    mean, std = float(values.mean()), float(values.std())
    return Images(train, test, classes, 1, side, (mean,), (std,))


class EpochBatches(Sampler[list[int]]):
    r"""The batches of one rank, as a function of seed, epoch and step; it has no state.

    Step s takes the images at positions ``s * batch_size`` onwards of the epoch's order, and rank
    r the r-th of W equal parts of these. So W ranks see together what one rank sees, at the same
    positions. What is left over at the end of an epoch is left out.

    Communication: none; every rank computes the same order.

    Args:
        length: images in the data set.
        batch_size: of all ranks together.
        rank: r.
        world_size: W.
        seed: of the order; the same on all ranks.

    Yields:
        The indices of the rank's ``batch_size / W`` images of a step.

    Raises:
        ValueError: a batch size that W doesn't divide, or larger than `length`.

    Example:
        >>> batches = EpochBatches(7, 4, rank=1, world_size=2)
        >>> [len(indices) for indices in batches]
        [2]
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"{CALL}: --batch-size {batch_size} is not divisible by {world_size} ranks"
            )
        if batch_size > length:
            raise DataError(f"{CALL}: --batch-size {batch_size} is more than the {length} images")
        self.length, self.batch_size = length, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.steps = length // batch_size  # of a whole epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Go to an epoch of which some steps are done, before the loader is iterated."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Return how many steps are left of the epoch."""
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rank's indices, step by step."""
        order = permutation(Key(self.seed, self.epoch), DATA_SET, 0, self.length).tolist()
        share = self.batch_size // self.world_size
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size + self.rank * share
            yield order[first : first + share]


def make_loader(
    dataset: Dataset[Any], batches: Iterable[list[int]], workers: int = 0
) -> DataLoader[Any]:
    """Load batches, images ``[N, c, H, H]`` in uint8 and labels ``[N]``.

    Loading reads and decodes; it draws no random numbers, neither here nor in the workers. So the
    batches don't depend on how many workers there are, and the random state stays what it was.

    Args:
        dataset: an `Images.train` or `Images.test`.
        batches: `EpochBatches`, or other lists of indices.
        workers: processes that read ahead; they live as long as the loader. 0 reads in this one.

    Returns:
        A loader, for any number of epochs; see `EpochBatches.set_epoch`. It raises a `UserError` of
        its workers as it would be without them.
    """
    if workers:
        start_tracker()
    return _Loader(
        _Batches(dataset),
        batch_sampler=batches,
        collate_fn=_as_they_are,
        num_workers=workers,
        # A fork of a process with threads of gloo, NCCL or CUDA may hang.
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader draws a seed for its workers with it.
        generator=torch.Generator().manual_seed(0),
    )


class _Batches(Dataset[Any]):
    """A data set by batches; a `UserError` is returned, and `_Loader` raises it.

    What a worker raises, torch raises with the worker's traceback for its message.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            if hasattr(self.dataset, "__getitems__"):
                batch = self.dataset.__getitems__(indices)
            else:
                batch = [self.dataset[index] for index in indices]
            return default_collate(batch) if isinstance(batch, list) else batch
        except UserError as error:
            return error


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # a cycle with this frame would end its workers by a time limit only
            yield batch


def _as_they_are(batch: Any) -> Any:
    return batch
