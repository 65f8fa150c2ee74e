"""What every test gets: a seed, an end to the ranks' processes, and no gpu test without a GPU."""

from collections.abc import Iterator

import pytest
import torch

import ranks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _end_of_ranks() -> Iterator[None]:
    yield
    ranks.stop_all()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
