"""What is measured of a model; the command line's tests measure whole checkpoints."""

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from shuffle_batchnorm.moco import measure
from shuffle_batchnorm.moco.config import Config
from shuffle_batchnorm.moco.data.images import ArrayImages
from shuffle_batchnorm.moco.measure import Measurements
from shuffle_batchnorm.moco.ranks.launch import Rank


def test_evaluation_sees_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a last batch that is left out because it is smaller, and a share seen twice."""
    monkeypatch.setattr(measure, "EVALUATION_BATCH", 2)
    seen: list[int] = []

    def gather(_: Rank, value: Any) -> list[Any]:
        seen.extend(value[1].tolist())
        return []

    monkeypatch.setattr(measure, "gather_objects", gather)
    part = ArrayImages(torch.ones(7, 1, 2, 2, dtype=torch.uint8), torch.arange(7))
    views = MagicMock(as_they_are=lambda images: images.flatten(1).float())
    for index in (0, 1):
        rank = Rank(index, 2, torch.device("cpu"))
        model: Any = MagicMock(encoder_q=nn.Linear(4, 3))
        assert Measurements(Config(), model, MagicMock(), views, rank)._features(part) is None
    assert seen == [0, 2, 4, 6, 1, 3, 5]
