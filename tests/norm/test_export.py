"""A model in eval mode leaves PyTorch as one with nn.BatchNorm does: torch.export and ONNX."""

import warnings

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm

DYNAMIC = ({0: torch.export.Dim("n")},)


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    ShuffleBatchNorm.convert_shuffle_batchnorm(model, mode="regroup", groups=4)
    model(torch.randn(8, 3, 6, 6) * 2 + 1)  # running statistics that are not those of a new layer
    return model.eval()


def _images(n: int) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def test_torch_export(model: nn.Module) -> None:
    """Catches an eval mode with anything in it that torch.export can't take."""
    exported = torch.export.export(model, (_images(5),), dynamic_shapes=DYNAMIC).module()
    for n in (1, 7):
        x = _images(n)
        torch.testing.assert_close(exported(x), model(x), rtol=0, atol=0)


def test_onnx(model: nn.Module) -> None:
    """Catches an operation that ONNX has not, or a batch size that is fixed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own code
        program = torch.onnx.export(
            model, (_images(5),), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False
        )
    assert program is not None
    graph = ReferenceEvaluator(program.model_proto)
    for n in (1, 7):
        x = _images(n)
        (got,) = graph.run(None, {graph.input_names[0]: x.numpy()})
        np.testing.assert_allclose(np.asarray(got), model(x).detach().numpy(), rtol=1e-5, atol=1e-5)
