"""The data sets by name, and batches that follow from seed, epoch and step alone."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from shuffle_batchnorm.moco.config import ConfigError, DataConfig, UserError
from shuffle_batchnorm.moco.data.images import DataError
from shuffle_batchnorm.moco.data.loading import EpochBatches, load_data, make_loader


def test_digits_are_split_alike_every_time() -> None:
    torch.manual_seed(1)
    first = load_data(DataConfig())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load_data(DataConfig())
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("train", "test"):
        a, b = (getattr(images, part) for images in (first, again))
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=0)
        # The same share of every class.
        share = torch.bincount(a.labels) / len(a)
        torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.01, rtol=0)
    assert len(first.train) + len(first.test) == 1797  # type: ignore[arg-type]


def test_digits_statistics_are_those_of_the_training_images() -> None:
    images = load_data(DataConfig(image_size=12))
    train: Any = images.train
    values = train.images / 255
    assert train.images.shape[1:] == (1, 12, 12)
    assert images.mean == pytest.approx((float(values.mean()),))
    assert images.std == pytest.approx((float(values.std()),))
    assert train.images.max() > 240


def test_validation_takes_from_the_training_images() -> None:
    """Catches settings chosen by test images, and a validation image that is also trained on."""
    whole, images = (load_data(DataConfig(validation=value)) for value in (False, True))
    loader = make_loader(images.train, [[0, 4, 5]])
    batch, labels = next(iter(loader))
    for position, number in enumerate((1, 5, 7)):  # 0 and 6 are held out
        image, label = whole.train[number]
        assert torch.equal(batch[position], image)
        assert labels[position] == label
    train: Any = whole.train
    parts = [next(iter(make_loader(p, [range(len(p))])))[0] for p in (images.train, images.test)]  # type: ignore[arg-type, list-item]
    assert torch.equal(parts[1], train.images[::6])
    assert [len(part) for part in parts] == [1438 - 240, 240]
    assert images.mean == whole.mean
    assert whole.remarks == ()
    assert "not of test images" in images.remarks[-1]  # `train` and `evaluate` print it


def test_a_part_of_images_that_come_one_by_one() -> None:
    """Catches a list of items where a batch is wanted: a `Subset` gives one."""
    part = Subset(Broken(ValueError("never")), [3, 1, 2])
    loader = make_loader(part, [[0, 1], [2]])
    assert [batch.tolist() for batch in loader] == [[3, 1], [2]]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagefolder"])
def test_data_path_is_asked_for(dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^train: --dataset {dataset} needs --data-path, the fold"):
        load_data(DataConfig(dataset))
    with pytest.raises(DataError, match=r"^train: --data-path .*nowhere does not exist; it is the"):
        load_data(DataConfig(dataset, tmp_path / "nowhere"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_rank(world_size: int) -> None:
    """At the same positions, so that virtual groups are the same too."""
    whole = list(EpochBatches(50, 12, seed=3))
    shares = [
        list(EpochBatches(50, 12, rank=rank, world_size=world_size, seed=3))
        for rank in range(world_size)
    ]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    assert len(whole) == 4
    assert len({index for batch in whole for index in batch}) == 48


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.rand(1)
        batches = EpochBatches(20, 5, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_an_epoch_goes_on_where_it_stopped() -> None:
    batches, rest = EpochBatches(40, 8), EpochBatches(40, 8)
    batches.set_epoch(1)
    whole = list(batches)
    rest.set_epoch(1, 2)
    assert list(rest) == whole[2:]
    assert (len(batches), len(rest), rest.steps) == (5, 3, 5)
    rest.set_epoch(1)
    assert list(rest) == whole
    rest.set_epoch(1, 5)
    assert list(rest) == []
    assert len(rest) == 0


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="--batch-size 10 is not divisible by 3 ranks"):
        EpochBatches(100, 10, world_size=3)
    with pytest.raises(DataError, match="--batch-size 10 is more than the 9 images"):
        EpochBatches(9, 10)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    """Two epochs through the same workers, the second one from its middle."""
    images, batches = load_data(DataConfig()), EpochBatches(1438, 400)
    loaders = [make_loader(images.train, batches, n) for n in (0, workers)]
    seen: list[list[tuple[Tensor, Tensor]]] = [[], []]
    state = torch.get_rng_state()
    for epoch, start in ((0, 0), (1, 1)):
        for loader, list_ in zip(loaders, seen, strict=True):
            batches.set_epoch(epoch, start)
            list_ += list(loader)
    assert len(seen[0]) == 3 + 2
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


class Broken(Dataset[Any]):
    """Raises for one of its images, whatever else is asked for."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> Tensor:
        if index == 5:
            raise self.error
        return torch.tensor(index)


@pytest.mark.parametrize(
    ("workers", "error"), [(0, ConfigError("no")), (2, DataError("train: a.png is no image"))]
)
def test_a_users_error_is_that_of_the_worker(workers: int, error: UserError) -> None:
    """Catches torch's text, which holds the worker's traceback; the batches before it are there.

    And an error that ends the loader for good: the next epoch has batches again.
    """
    loader = make_loader(Broken(error), [[0, 1], [2, 5], [3, 4]], workers)
    for _ in range(2):
        batches = iter(loader)
        assert next(batches).tolist() == [0, 1]
        with pytest.raises(type(error)) as caught:
            next(batches)
        assert str(caught.value) == str(error)


def test_a_batch_holds_the_images_it_names() -> None:
    """Catches the short cut for images in memory doing something else than one by one."""
    images = load_data(DataConfig())
    train: Any = images.train
    (batch, labels) = next(iter(make_loader(train, [[5, 3, 1400]])))
    assert batch.dtype == torch.uint8
    for position, index in enumerate((5, 3, 1400)):
        torch.testing.assert_close(batch[position], train[index][0])
        assert labels[position] == train[index][1]
