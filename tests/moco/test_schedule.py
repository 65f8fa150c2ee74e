"""The learning rate, step by step."""

import pytest

from shuffle_batchnorm.moco.config import Config, OptimConfig
from shuffle_batchnorm.moco.schedule import learning_rate


def test_learning_rate_rises_and_falls_step_by_step() -> None:
    config = Config(optim=OptimConfig(lr=1.0, epochs=4, warmup_epochs=1))
    rates = [learning_rate(config, step, 4) for step in range(16)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[10] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[15] < 0.02
