"""What every test of the study gets: quick intervals."""

import pytest

from shuffle_batchnorm.moco.study import fit


@pytest.fixture(autouse=True)
def _few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "REPLICATES", 10)
