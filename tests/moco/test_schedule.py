"""The learning rate, and figures between two marks."""

import pytest

from shuffle_batchnorm.moco.config import Config, OptimConfig
from shuffle_batchnorm.moco.schedule import Mark, learning_rate


def test_learning_rate_rises_and_falls_step_by_step() -> None:
    config = Config(optim=OptimConfig(lr=1.0, epochs=4, warmup_epochs=1))
    rates = [learning_rate(config, step, 4) for step in range(16)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[10] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[15] < 0.02


def test_marks_give_means_over_steps_and_ranks() -> None:
    earlier, later = Mark(2, 10.0, 1.0, 3.0), Mark(6, 26.0, 3.0, 5.0)
    assert later.means_since(earlier, 2) == (2.0, 0.25)
    assert later.speed_since(earlier, 32) == 64.0
