"""Random states: saved as plain values, restored, and not lost by whoever calls the trainer."""

import io
import random

import numpy as np
import torch

from shuffle_batchnorm import get_shuffle_state, set_shuffle_state
from shuffle_batchnorm.moco.random_state import (
    get_random_state,
    own_random_state,
    set_random_state,
)
from shuffle_batchnorm.probe.isolation import seed_all

CPU = torch.device("cpu")


def draw() -> list[float]:
    normal = np.random.normal()  # noqa: NPY002  # leaves half a pair behind
    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), normal]


def test_goes_on_where_it_was_after_a_checkpoint() -> None:
    draw()
    file = io.BytesIO()
    torch.save(get_random_state(CPU), file)
    expected = draw()
    draw()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True), CPU)
    assert draw() == expected


def test_borrowed_states_come_back() -> None:
    set_shuffle_state((5, 6))
    before = get_random_state(CPU)
    with own_random_state():
        seed_all(3)
        set_shuffle_state((7, 0))
    expected = draw()
    set_random_state(before, CPU)
    assert draw() == expected
    assert get_shuffle_state() == (5, 6)
    set_shuffle_state(None)
