"""Convert a timm model, train a step beside a plain one, revert: 35 models, printed as a table.

PYTHONPATH=tests python tests/integrations/timm_models.py [NAME ...]
"""

import copy
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from integrations.torchvision_stub import torchvision_for_import
from shuffle_batchnorm import ShuffleBatchNorm

with torchvision_for_import(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm


class Settings(NamedTuple):
    """Where a model can't be made small in the usual way."""

    size: int = 64  # pixels
    options: dict[str, Any] = {}  # noqa: RUF012 -- never written


MODELS = {
    "resnet18": Settings(),
    "resnet50": Settings(),
    "resnet50d": Settings(),
    "resnext50_32x4d": Settings(),
    "seresnet50": Settings(),
    "vgg16_bn": Settings(options={"mlp_ratio": 0.02}),
    "hrnet_w18_small": Settings(),
    "dla34": Settings(),
    "res2net50_26w_4s": Settings(),
    "levit_128s": Settings(size=224),
    "efficientformer_l1": Settings(size=224),
    "resnest14d": Settings(),
    "efficientnet_b0": Settings(),
    "mobilenetv3_small_100": Settings(),
    "regnetx_002": Settings(),
    "regnety_002": Settings(),
    "densenet121": Settings(),
    "resnetv2_50": Settings(),
    "repvgg_a0": Settings(),
    "cspresnet50": Settings(),
    "dpn68": Settings(),
    "inception_v3": Settings(size=128),
    "mobilevit_xxs": Settings(),
    "ese_vovnet19b_dw": Settings(),
    "ghostnet_100": Settings(),
    "fastvit_t8": Settings(),
    "mobileone_s0": Settings(),
    "legacy_xception": Settings(),
    "tresnet_m": Settings(),
    "rexnet_100": Settings(),
    "lcnet_050": Settings(),
    "mixnet_s": Settings(),
    "mobilenetv4_conv_small": Settings(),
    "repghostnet_050": Settings(),
    "skresnet18": Settings(),
}
SAMPLES, GROUPS = 8, 2


def check(name: str, size: int | None = None) -> int:
    """Raise an AssertionError if a model does not train or revert as it should.

    Returns:
        How many layers were converted.
    """
    settings = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **settings.options).double()
    images = torch.randn(SAMPLES, 3, *[size or settings.size] * 2, dtype=torch.float64)

    _assert_steps_equal(model, images, plain_batch_norm, mode="local")
    ours = _assert_steps_equal(model, images, regrouped_batch_norm, mode="regroup", groups=GROUPS)

    theirs = copy.deepcopy(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    want = theirs.eval()(images)
    assert torch.equal(ours.eval()(images), want)
    number = sum(isinstance(m, ShuffleBatchNorm) for m in ours.modules())
    reverted = ShuffleBatchNorm.revert_shuffle_batchnorm(ours)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(reverted(images), want)
    reverted.load_state_dict(model.state_dict())
    return number


def _assert_steps_equal(
    model: nn.Module, images: Tensor, batch_norm: Callable[..., Tensor], **options: Any
) -> nn.Module:
    """Compare a step of the converted model with one of the model as it is; return the former."""
    reference = copy.deepcopy(model)
    with mock.patch.object(F, "batch_norm", batch_norm):
        want = train_step(reference, images)
    ours = ShuffleBatchNorm.convert_shuffle_batchnorm(copy.deepcopy(model), **options)
    norms = [m for m in ours.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert all(isinstance(m, ShuffleBatchNorm) for m in norms)
    ours = copy.deepcopy(ours)  # as MoCo's key encoder is one
    got = train_step(ours, images)
    for key, tensor in want.items():
        # Not below: a bias before a convolution and a batch norm has a gradient of rounding alone.
        scale = tensor.abs().max().clamp(min=0.01)
        error = (got[key] - tensor).abs().max() / scale
        assert error < 1e-10, f"{options}: {key} is off by {error:.1e}"
    return ours


def train_step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the loss, all gradients and all buffers after a step."""
    torch.manual_seed(1)  # dropout and stochastic depth are alike
    labels = torch.arange(SAMPLES) % 10
    loss = F.cross_entropy(model.train()(images), labels)
    loss.backward()
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads, **dict(model.named_buffers())}


plain_batch_norm = F.batch_norm


def regrouped_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Plain batch norm of new groups: with two of each, the second half of both is exchanged."""
    assert training
    (a, b), (c, d) = (half.chunk(2) for half in torch.arange(len(x)).chunk(GROUPS))
    order = torch.cat([a, d, c, b])
    parts = x[order].chunk(GROUPS)
    with torch.no_grad():
        flat = [part.movedim(1, 0).flatten(1) for part in parts]
        running_mean.lerp_(torch.stack([p.mean(dim=1) for p in flat]).mean(dim=0), momentum)
        running_var.lerp_(torch.stack([p.var(dim=1) for p in flat]).mean(dim=0), momentum)
    y = torch.cat([plain_batch_norm(p, None, None, weight, bias, True, 0, eps) for p in parts])
    return y[order.argsort()]


def main(names: list[str]) -> int:
    """Check models, print a line for each; return how many fail."""
    failed = 0
    for name in names or MODELS:
        start = time.perf_counter()
        try:
            outcome = f"{check(name)} layers, equal"
        except Exception as error:
            failed += 1
            outcome = f"FAILS: {type(error).__name__}: {error}"
        print(f"{name:24} {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(names or MODELS) - failed} of {len(names or MODELS)} hold")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
