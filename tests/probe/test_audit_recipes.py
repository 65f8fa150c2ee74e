"""The recipes of docs/audit.md run as they are printed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shuffle_batchnorm
from pages import DOCS, blocks, run_block
from probe.known_leaks import one_thread

__all__ = ["one_thread"]  # a fixture

PAGE = DOCS / "audit.md"
FIRST, FEW_SHOT, RETRIEVAL, WORST = [block for block in blocks(PAGE) if block.language == "python"]


class _FewShot(nn.Module):
    """Scores of queries: how close they are to the mean of each class's five shots."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 8, 3)
        self.embed = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())

    def forward(self, queries: Tensor, support: Tensor) -> Tensor:
        classes = self.embed(support).unflatten(0, (5, 5)).mean(dim=1)
        return -torch.cdist(self.embed(queries), classes)


def test_the_first_example() -> None:
    run_block(FIRST, PAGE, {})


def test_a_few_shot_model(capsys: pytest.CaptureFixture[str]) -> None:
    queries, support, others = (torch.randn(n, 3, 6, 6) for n in (15, 25, 30))
    episode = {"queries": others, "support": support}
    known = dict(model=_FewShot(), queries=queries, support=support, other_episode=episode)
    run_block(FEW_SHOT, PAGE, known)  # asserts that eval mode has no dependence
    assert "100.0 %  embed.1  BatchNorm2d" in capsys.readouterr().out


def test_retrieval() -> None:
    known: dict[str, Any] = {"torch": torch, "audit": shuffle_batchnorm.audit}
    run_block(RETRIEVAL, PAGE, known)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
    gallery = torch.randn(40, 3, 2, 2)
    with pytest.raises(ValueError, match=r"embeddings depend on what else(.|\n)* 2  BatchNorm1d"):
        known["embed"](model, gallery, 16)
    found = known["embed"](model.eval(), gallery, 16)
    torch.testing.assert_close(found, model(gallery))


def test_the_worst_layers_are_converted() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    model = nn.Sequential(*layers)
    report = shuffle_batchnorm.audit(model, torch.randn(16, 8))
    known: dict[str, Any] = {"model": model, "report": report}
    run_block(WORST, PAGE, known)
    kinds = [type(layer) for layer in known["model"]]
    assert kinds.count(shuffle_batchnorm.ShuffleBatchNorm) == 4
    assert kinds.count(nn.BatchNorm1d) == 2
