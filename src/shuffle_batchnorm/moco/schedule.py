"""The learning rate of a step."""

import math

from .config import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    r"""Return the learning rate of a step: up along a line, then down along a cosine.

    .. math:: \text{lr}(s) = \text{lr} \cdot \min\left(\frac{s + 1}{S_w},
        \frac{1 + \cos(\pi (s - S_w) / (S - S_w))}{2}\right)

    with the cosine from step :math:`S_w` on, the end of the warm-up, to S, the end of the run.

    Args:
        config: the run.
        step: s, counted from 0.
        steps_per_epoch: of all ranks together.

    Example:
        >>> config = Config()
        >>> learning_rate(config, 0, 5), learning_rate(config, 150, 5)
        (0.12, 0.06)
    """
    optim = config.optim
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step - warmup) / (optim.epochs * steps_per_epoch - warmup)
    return optim.lr * (1 + math.cos(math.pi * done)) / 2
