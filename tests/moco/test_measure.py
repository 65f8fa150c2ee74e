"""What is measured of a model; the command line's tests measure whole checkpoints."""

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from shuffle_batchnorm.moco import measure
from shuffle_batchnorm.moco.config import Config, MoCoConfig, Norm, NormConfig
from shuffle_batchnorm.moco.data.images import ArrayImages
from shuffle_batchnorm.moco.measure import Measurements, remarks
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


def test_facts_of_a_run() -> None:
    """Catches a count of one rank's images, or of the key encoder's frozen copy as well."""
    model: Any = MagicMock(encoder_q=nn.Linear(4, 3), encoder_k=nn.Linear(4, 3))
    images: Any = MagicMock(train=range(7), test=range(5))
    rank = Rank(1, 2, torch.device("cpu"))
    assert Measurements(Config(), model, images, MagicMock(), rank).facts() == {
        "world_size": 2,
        "device": "cpu",
        "train_images": 7,
        "test_images": 5,
        "parameters": 15,
    }


@pytest.mark.parametrize(
    ("queue", "count", "keys"),
    [(24, 24, ""), (25, 24, "1 older key"), (4096, 24, "171 older keys"), (65536, 1281167, "")],
)
def test_a_queue_longer_than_the_data_is_said(queue: int, count: int, keys: str) -> None:
    images = MagicMock(train=range(count), remarks=("a remark of the data set",))
    first, *others = remarks(Config(moco=MoCoConfig(queue=queue)), images)
    assert first == "a remark of the data set"
    long = f"--queue {queue} is longer than the {count} images"
    expected = f"{long}: among a query's negatives are about {keys} of its own image"
    assert others == ([expected] if keys else [])
    simclr = Config(norm=NormConfig(bn="simclr"), moco=MoCoConfig(queue=queue))
    assert remarks(simclr, images) == [first]


def test_negatives_of_the_leak_are_those_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a queue that nobody has filled, and keys that share what their queries know."""
    calls: list[dict[str, Any]] = []

    def measure_leak(*arguments: Any, **options: Any) -> None:
        calls.append({"queue": arguments[4], **options})

    monkeypatch.setattr(measure, "measure_leak", measure_leak)
    kinds: dict[Norm, int] = {"simclr": 1, "sync": 1, "eman": 8, "regroup": 8}
    for bn in kinds:
        config = Config(norm=NormConfig(bn=bn))
        rank = Rank(0, 1, torch.device("cpu"))
        model: Any = MagicMock(queue="the queue")
        Measurements(config, model, MagicMock(), MagicMock(), rank).leak()
    assert [call["queue"] for call in calls] == [None, *["the queue"] * 3]
    assert [call["keys_per_pass"] for call in calls] == list(kinds.values())


@pytest.mark.parametrize("classes", [1, 2])
def test_one_class_has_no_accuracy(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kNN accuracy of 1 that says nothing; scikit-learn refuses its classifier."""
    labels = torch.arange(8) % classes
    part = ArrayImages(torch.eye(8).mul(255).byte()[:, None, None], labels)
    views = MagicMock(as_they_are=lambda images: images.flatten(1).float())
    images = MagicMock(classes=classes, train=part, test=part)
    model: Any = MagicMock(encoder_q=nn.Identity())
    monkeypatch.setattr(measure, "synchronize_running_stats", lambda _: None)
    rank = Rank(0, 1, torch.device("cpu"))
    scores = Measurements(Config(), model, images, views, rank)
    assert [scores.knn(), scores.linear()] == ([None, None] if classes == 1 else [1.0, 1.0])
