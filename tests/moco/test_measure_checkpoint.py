"""What is asked of a checkpoint's model, and refused; test_cli.py asks real ones."""

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from shuffle_batchnorm.moco import measure_checkpoint
from shuffle_batchnorm.moco.config import Config, ConfigError, NormConfig
from shuffle_batchnorm.moco.ranks.launch import Rank


def test_one_key_has_no_negatives_without_a_queue() -> None:
    """Catches the traceback of the probe, which asks for two."""
    config = Config(norm=NormConfig(bn="simclr"))
    measurements: Any = MagicMock(config=config, rank=Rank(0, 1, torch.device("cpu")))
    measurements.images.train = range(1000)
    with pytest.raises(ConfigError, match=r"^probe: --keys 1 leaves no negative: --bn simcl"):
        measure_checkpoint._probe(measurements, batches=8, keys=1, by_layer=False)
