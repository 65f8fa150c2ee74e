"""Which samples are probes, and what stands in for the others."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm.probe.others import arguments, choose_rows, count_samples, replace_others


@pytest.mark.parametrize(("count", "probes"), [(2, [0]), (16, [0, 8]), (64, range(0, 64, 8))])
def test_an_eighth_is_probed_by_default(count: int, probes: Any) -> None:
    assert choose_rows("audit", count, None).probes.tolist() == list(probes)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("count", [3, 4, 20])
def test_probes_stay_and_others_are_not_merely_permuted(count: int, replace: bool) -> None:
    """Three samples have two others, which a fair draw permutes in half of all cases."""
    x, pool = torch.arange(count), torch.arange(100, 140)
    rows = choose_rows("audit", count, [1])
    for seed in range(20):
        fresh = replace_others("audit", x, rows, pool if replace else None, seed).tolist()
        others = [value for k, value in enumerate(fresh) if k != 1]
        assert fresh[1] == 1
        if replace:
            assert len(set(others)) == count - 1
            assert min(others) >= 100
        else:
            assert len(set(others)) < count - 1
            assert 1 not in others


def test_a_small_pool_is_drawn_from_again_and_again() -> None:
    rows = choose_rows("audit", 6, [0])
    fresh = replace_others("audit", torch.zeros(6), rows, torch.ones(1), 0)
    assert fresh.tolist() == [0, 1, 1, 1, 1, 1]


def test_all_tensors_of_a_tree_are_replaced_alike_and_the_rest_is_handed_on() -> None:
    inputs: dict[str, Any] = {
        "x": torch.arange(8),
        "y": (-torch.arange(8), 3.0),
        "mask": torch.ones(2),
    }
    rows = choose_rows("audit", count_samples("audit", "inputs", inputs), [0])
    fresh = replace_others("audit", inputs, rows, None, 0)
    assert torch.equal(fresh["x"], -fresh["y"][0])
    assert fresh["y"][1] == 3.0
    assert fresh["mask"] is inputs["mask"]
    assert inputs["x"].tolist() == list(range(8))


def test_arguments_are_by_position_or_by_name() -> None:
    assert arguments((1, 2)) == ((1, 2), {})
    assert arguments({"x": 1}) == ((), {"x": 1})
    assert arguments(1) == ((1,), {})


def _refused(x: Tensor, probes: Any = None, replace: Any = None) -> None:
    rows = choose_rows("audit", count_samples("audit", "inputs", x), probes)
    replace_others("audit", x, rows, replace, 0)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "inputs must have at least 2 samples, got 1"),
        (4, {"probes": [0, 4]}, "probes must be different positions from 0 to 3, got [0, 4]"),
        (4, {"probes": [1, 1]}, "probes must be different positions from 0 to 3, got [1, 1]"),
        (2, {"probes": [0, 1]}, "probes must be at least 1 and fewer than the 2 samples, got 2"),
        (2, {"probes": []}, "probes must be at least 1 and fewer than the 2 samples, got 0"),
        (4, {"probes": 2}, "probes must be positions, a list of ints, got 2"),
        (4, {"probes": [0.5]}, "probes must be positions, a list of ints, got [0.5]"),
        (4, {"probes": torch.eye(4)[0] > 0}, "probes must be positions, a list of ints, got tens"),
        (4, {"probes": [[1]]}, "probes must be positions, a list of ints, got [[1]]"),
        (2, {}, "2 samples with 1 probes leave 1 other, which can't be drawn from itself; pass"),
        (4, {"replace": (torch.ones(3, 2),)}, "replace must have the structure of inputs"),
        (4, {"replace": torch.ones(3, 1)}, "of inputs, [M, 2] with M from 1, got shape (3, 1)"),
        (4, {"replace": torch.ones(0, 2)}, "with M from 1, got shape (0, 2)"),
        (4, {"replace": torch.zeros(1, 2)}, "the other samples were replaced by equal ones"),
    ],
)
def test_errors_name_the_rule(count: int, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match="^audit: .*" + re.escape(message)):
        _refused(torch.zeros(count, 2), **options)


def test_a_pool_is_not_rounded() -> None:
    with pytest.raises(TypeError, match=r"^audit: replace must have .* torch.int64, got torch.flo"):
        _refused(torch.arange(4), None, torch.rand(3))


def test_inputs_need_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"^audit: inputs must be a tensor \[N, \*\], or .* str"):
        count_samples("audit", "inputs", "text")
