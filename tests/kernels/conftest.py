"""What several tests of kernels take."""

from collections.abc import Iterator

import pytest

from shuffle_batchnorm.kernels import tiles


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Split even small blocks, down to single steps."""
    monkeypatch.setattr(tiles, "_STEPS", 1)
    monkeypatch.setattr(tiles, "_UNSPLIT", 1)
    tiles.reduction.cache_clear()
    yield
    tiles.reduction.cache_clear()
