"""What a configuration may be, and that it survives JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moco.moco_runs import small_config
from shuffle_batchnorm.moco.config import Config, ConfigError, flat, from_dict, to_dict, validate


def changed(changes: Mapping[str, Any]) -> Config:
    return small_config(Path("runs/x"), **changes)


def test_defaults_are_valid_on_one_rank_and_several() -> None:
    for world_size in (1, 2, 8):
        validate(Config(), world_size)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (
            {"batch_size": 250, "groups": 16},
            2,
            "--batch-size 250 is not divisible by 2 ranks x 16 groups = 32",
        ),
        (
            {"batch_size": 32, "groups": 16},
            2,
            (
                "--batch-size 32 over 2 ranks x 16 groups = 32 leaves 1 image per group; batch "
                "statistics need 2 or more"
            ),
        ),
        (
            {"queue": 127},
            1,
            "--queue 127 is smaller than --batch-size 128: it could not hold the keys of one step",
        ),
        (
            {"queue": 255, "symmetric": True},
            1,
            (
                "--queue 255 is smaller than twice --batch-size 128: it could not hold the keys of "
                "one step"
            ),
        ),
        (
            {"groups": 1},
            1,
            (
                "--bn regroup needs 2 groups or more over all ranks, but --groups 1 on 1 rank is "
                "one: use --groups 8, or more ranks"
            ),
        ),
        (
            {"groups": 1, "bn": "batch-shuffle"},
            1,
            (
                "--bn batch-shuffle needs 2 groups or more over all ranks, but --groups 1 on 1 "
                "rank is one: use --groups 8, or more ranks"
            ),
        ),
        (
            {"offset": 64, "bn": "swap"},
            2,
            (
                "--offset 64 goes round the 32 groups and ends where it began: --bn swap would do "
                "nothing"
            ),
        ),
        ({"blocks": 1}, 1, "--blocks 1 leaves every group together: --bn regroup needs 2 or more"),
        ({"bn": "sync", "layers": "x"}, 1, "--layers is for --bn swap and regroup, not sync"),
        (
            {"bn": "eman", "buffers": "copy"},
            1,
            (
                "--bn eman averages the query encoder's statistics with --momentum, and --buffers "
                "copy would not"
            ),
        ),
        ({"warmup_epochs": 2}, 1, "--warmup-epochs 2 leaves nothing of --epochs 2"),
        ({"dataset": "cifar10"}, 1, "--dataset cifar10 needs --data-path"),
        ({"lr": -1.0}, 1, "--lr must be above 0, got -1.0"),
        ({"lr": math.nan}, 1, "--lr must be above 0, got nan"),
        ({"lr": math.inf}, 1, "--lr must be above 0, got inf"),
        ({"momentum": 1.0}, 1, "--momentum must be from 0 to below 1, got 1.0"),
        ({"epochs": 0}, 1, "--epochs must be at least 1, got 0"),
        ({"workers": -1}, 1, "--workers must be at least 0, got -1"),
        ({"ranks": 0}, 1, "--ranks must be at least 1, got 0"),
        (
            {"augment": "all"},
            1,
            "--augment must be one of standard, none, got all",
        ),
    ],
)
def test_refused(changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(changed(changes), world_size)
    assert str(refusal.value) == f"train: {message}"


def test_accumulation_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="batch statistics and the queue see the micro-batch"):
        validate(changed({"accumulate": 2}), 1)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"groups": 1}, 2),
        ({"groups": 1, "bn": "local"}, 1),
        ({"groups": 1, "bn": "sync"}, 1),
        ({"groups": 1, "bn": "eman", "buffers": "momentum"}, 1),
        ({"blocks": 1, "bn": "swap"}, 1),
        ({"queue": 128}, 1),
        ({"layers": "x", "bn": "swap"}, 1),
        ({"queue": 1, "bn": "simclr", "groups": 1, "symmetric": True}, 1),
        ({"dataset": "imagefolder", "data_path": Path("x")}, 1),
    ],
)
def test_accepted(changes: dict[str, Any], world_size: int) -> None:
    validate(changed(changes), world_size)


def test_survives_json() -> None:
    config = changed({"data_path": Path("a b"), "ranks": 2, "lr": 0.1, "bn": "batch-shuffle"})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict({}) == Config()


@pytest.mark.parametrize("wrong", [{"dat": {}}, {"data": {"dataste": "digits"}}])
def test_unknown_names_are_refused(wrong: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="'dat"):
        from_dict(wrong)


def test_flags_have_unique_names() -> None:
    """Flags are flat: two parts with a field of the same name would hide one of them."""
    parts = to_dict(Config()).values()
    assert len(flat(Config())) == sum(map(len, parts))
