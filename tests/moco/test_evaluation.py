"""kNN and the linear probe, and that to evaluate an encoder does not change it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shuffle_batchnorm.moco.config import NetworkConfig
from shuffle_batchnorm.moco.evaluation import extract_features, knn_accuracy, linear_probe
from shuffle_batchnorm.moco.networks import make_encoder


def _clusters(classes: int = 4, each: int = 12, spread: float = 0.2) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat(each)
    return F.normalize(torch.eye(8)[labels] + spread * torch.randn(len(labels), 8)), labels


def test_extraction_leaves_the_encoder_as_it_was() -> None:
    encoder = make_encoder(NetworkConfig(dim=4), 1, 16)
    frozen = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)][1]
    frozen.eval()
    flags = [m.training for m in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = torch.randn(6, 1, 16, 16)
    loader = [(images[:4], torch.arange(4)), (images[4:], torch.arange(2))]
    features, labels = extract_features(encoder, loader)
    assert [m.training for m in encoder.modules()] == flags
    torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)
    assert not features.requires_grad
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    # Running statistics: how the images are cut into batches makes no difference.
    whole, _ = extract_features(encoder, [(images, labels)])
    torch.testing.assert_close(features, whole)
    torch.testing.assert_close(features, F.normalize(encoder.backbone.eval()(images)))


def test_training_flags_come_back_after_an_error() -> None:
    encoder = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        extract_features(encoder, [(torch.zeros(2, 4), torch.zeros(2))])
    assert encoder.training


def test_images_are_prepared() -> None:
    features, _ = extract_features(
        nn.Identity(), [(torch.full((1, 2), 7, dtype=torch.uint8), torch.zeros(1))],
        prepare=lambda images: images.double() - torch.tensor([6.0, 7.0]),
    )  # fmt: skip
    torch.testing.assert_close(features, torch.tensor([[1.0, 0.0]]).double())


def test_knn_is_the_vote_that_the_formula_says() -> None:
    train, labels = _clusters(spread=1.0)
    test, test_labels = _clusters(spread=1.0)
    hits = 0
    for x, label in zip(test, test_labels, strict=True):
        similarity = train @ x
        votes = torch.zeros(4)
        for i in similarity.argsort(descending=True)[:5]:
            votes[labels[i]] += (similarity[i] / 0.3).exp()
        hits += int(votes.argmax() == label)
    for chunk in (7, 1000):
        found = knn_accuracy(
            train, labels, test, test_labels, k=5, temperature=0.3, classes=4, chunk=chunk
        )
        assert found == hits / len(test)
    assert 0.3 < hits / len(test) < 1


def test_knn_weighs_by_similarity() -> None:
    """One very near neighbour outvotes two far ones; without weights it loses."""
    train = F.normalize(torch.tensor([[1.0, 0.0], [0.2, 1.0], [0.2, 1.1]]))
    labels = torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(train, labels, test, labels[:1], k=20, classes=2) == 1
    assert knn_accuracy(train, labels, test, labels[:1], temperature=1e6, classes=2) == 0


def test_knn_with_a_small_temperature_stays_finite() -> None:
    train, labels = _clusters()
    assert knn_accuracy(train, labels, train, labels, k=3, temperature=1e-3, classes=4) == 1


def test_linear_probe_reads_what_is_linear_and_nothing_else() -> None:
    train, labels = _clusters(spread=0.1)
    test, test_labels = _clusters(spread=0.1)
    assert linear_probe(train, labels, test, test_labels) == 1
    noise = torch.randn(400, 8)
    chance = linear_probe(noise, torch.arange(400) % 4, torch.randn(400, 8), torch.arange(400) % 4)
    assert 0.1 < chance < 0.4


def test_linear_probe_does_not_mind_the_scale_of_a_feature() -> None:
    train, labels = _clusters()
    scale = 10.0 ** torch.arange(-4, 4)
    assert linear_probe(train * scale, labels, train * scale, labels) == 1
    assert linear_probe(train, labels, train, labels, iterations=1) > 0.25  # with no warning
