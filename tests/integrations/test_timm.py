"""timm's models: they train as plain ones do, revert; and what timm's own tools make of them.

`timm_models.py` tries many more.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from integrations.torchvision_stub import torchvision_for_import
from shuffle_batchnorm import ShuffleBatchNorm

with torchvision_for_import(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("timm")
    import timm
    import timm.layers
    import timm.utils

from integrations import timm_models

layers: Any = timm.layers
utils: Any = timm.utils
CONVERT: Any = ShuffleBatchNorm.convert_shuffle_batchnorm
REVERT: Any = ShuffleBatchNorm.revert_shuffle_batchnorm
IMAGES = torch.Size([8, 3, 32, 32])


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "efficientnet_b0",
        "mobilenetv3_small_100",
        "regnetx_002",
        "densenet121",
        "ghostnet_100",
    ],
)
def test_a_model_trains_and_reverts(name: str) -> None:
    """Catches a lost activation, renamed keys, layers left out, gradients that are not exact."""
    assert timm_models.check(name, size=32) > 0


@pytest.mark.parametrize("kind", ["BatchNormAct2d", "SyncBatchNormAct"])
def test_activation_and_dropout_are_kept(kind: str) -> None:
    """In training mode and eval mode, and as the same modules."""
    options = dict(act_layer=nn.SiLU, drop_layer=nn.Dropout)
    plain = layers.BatchNormAct2d(4, **options)
    layer = plain if kind == "BatchNormAct2d" else layers.convert_sync_batchnorm(plain)
    converted = CONVERT(layer, mode="local")
    assert isinstance(converted, ShuffleBatchNorm)
    x = torch.randn(6, 4, 5, 5)
    for training in (True, False):
        torch.manual_seed(2)
        want = plain.train(training)(x)
        torch.manual_seed(2)
        torch.testing.assert_close(converted.train(training)(x), want)
    assert [*converted._modules.items()] == [*layer._modules.items()]
    assert type(REVERT(converted)) is type(layer)


def test_features_and_ema() -> None:
    """Feature extractors, and the averaged copy for evaluation, take converted models."""
    model = CONVERT(_model(features_only=True), mode="regroup", groups=2)
    assert len(model(torch.randn(IMAGES))) == 5
    ema = utils.ModelEmaV3(model, decay=0.5)
    ema.update(model)
    assert any(isinstance(m, ShuffleBatchNorm) for m in ema.module.modules())


# What docs/integrations/timm.md says of timm's tools: where one of these fails, change that page.


def test_timms_sync_batchnorm_loses_activations_of_converted_layers() -> None:
    model = _model()
    converted = CONVERT(copy.deepcopy(model), mode="regroup", groups=2)
    with pytest.warns(UserWarning, match="replaces ShuffleBatchNorm layers, so that they shuffle"):
        replaced = layers.convert_sync_batchnorm(converted)
    assert not _count(replaced, ShuffleBatchNorm)
    x = torch.randn(IMAGES)
    assert not torch.allclose(replaced.eval()(x), model.eval()(x))


def test_timms_sync_batchnorm_and_then_conversion_keep_them() -> None:
    model = _model()
    converted = CONVERT(layers.convert_sync_batchnorm(copy.deepcopy(model)), mode="local")
    assert _count(converted, ShuffleBatchNorm) == _count(model, nn.BatchNorm2d)
    x = torch.randn(IMAGES)
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))


def test_timms_split_batchnorm_replaces_converted_layers() -> None:
    converted = CONVERT(_model(), mode="regroup", groups=2)
    assert not _count(layers.convert_splitbn_model(converted), ShuffleBatchNorm)
    with pytest.raises(TypeError, match="SplitBatchNorm2d"):
        CONVERT(layers.convert_splitbn_model(_model()), mode="regroup", groups=2)


def test_timms_freeze_leaves_the_statistics_of_converted_layers_moving() -> None:
    model = CONVERT(_model(), mode="regroup", groups=2)
    utils.freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    before = model.bn1.running_mean.clone()
    model.train()(torch.randn(IMAGES))
    assert not torch.equal(model.bn1.running_mean, before)


def test_timms_reparameterisation_takes_reverted_layers() -> None:
    model = timm.create_model("repvgg_a0", num_classes=10)
    converted = CONVERT(model, mode="regroup", groups=2).eval()
    with pytest.raises(AssertionError):
        utils.reparameterize_model(converted)
    x = torch.randn(IMAGES)
    want = converted(x)
    fused = utils.reparameterize_model(REVERT(converted))
    torch.testing.assert_close(fused(x), want, rtol=1e-3, atol=1e-3)


def test_frozen_layers_stay_frozen_in_a_conversion() -> None:
    """Those that timm has frozen are no batch norms any more; the others are converted."""
    model = _model()
    utils.freeze(model, ["blocks.0"])
    frozen = [type(m) for m in model.blocks[0].modules()]
    converted = CONVERT(model, mode="regroup", groups=2)
    assert [type(m) for m in converted.blocks[0].modules()] == frozen
    assert _count(converted, ShuffleBatchNorm) == 34 - 2


def _model(**options: Any) -> Any:
    return timm.create_model("mobilenetv3_small_100", num_classes=10, **options)


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in model.modules())
