"""The networks: shapes, names, stems, and errors that say what is wrong with --network."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shuffle_batchnorm.moco.config import NetworkConfig
from shuffle_batchnorm.moco.networks import NetworkError, ResNet, make_backbone, make_encoder


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize(
    ("network", "channels", "side"), [("small", 1, 16), ("small", 3, 33), ("resnet18", 3, 32)]
)
def test_encoders_give_directions(network: str, channels: int, side: int, mlp: bool) -> None:
    encoder = make_encoder(NetworkConfig(network, dim=7, mlp=mlp), channels, side)
    output = encoder(torch.randn(2, channels, side, side))
    torch.testing.assert_close(output.norm(dim=1), torch.ones(2))
    assert output.shape == (2, 7)


def test_directions_are_wide_whatever_autocast_does() -> None:
    """In bfloat16 a direction has length 1 to two digits only."""
    encoder = make_encoder(NetworkConfig(dim=8), 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(torch.randn(2, 1, 16, 16)).dtype == torch.float32
    assert encoder.double()(torch.randn(2, 1, 16, 16).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("network", "features", "count", "names"),
    [
        # The numbers of parameters are torchvision's without the classifier: 11689512 - 513000
        # and 25557032 - 2049000.
        ("resnet18", 512, 11_176_512, ["layer1.1.conv2.weight", "layer2.0.downsample.1.bias"]),
        ("resnet50", 2048, 23_508_032, ["layer1.0.downsample.0.weight", "layer4.2.conv3.weight"]),
    ],
)
def test_resnets_are_torchvisions(
    network: str, features: int, count: int, names: list[str]
) -> None:
    backbone, width = make_backbone(network, stem="imagenet", channels=3, image_size=32)
    parameters = dict(backbone.named_parameters())
    assert width == features
    assert sum(p.numel() for p in parameters.values()) == count
    assert {"conv1.weight", "bn1.weight", "layer3.1.bn2.weight", *names} <= set(parameters)
    assert not any(name.startswith("fc") for name in parameters)
    with torch.device("meta"):
        twin = make_backbone(network, stem="imagenet", channels=3, image_size=224)[0]
        assert twin(torch.zeros(2, 3, 224, 224)).shape == (2, features)


@pytest.mark.parametrize(
    ("stem", "side", "kernel"),
    [("auto", 32, 3), ("auto", 224, 7), ("cifar", 224, 3), ("imagenet", 32, 7)],
)
def test_stem(stem: str, side: int, kernel: int) -> None:
    backbone, _ = make_backbone("resnet18", stem=stem, channels=1, image_size=side)
    assert isinstance(backbone, ResNet)
    assert backbone.conv1.weight.shape == (64, 1, kernel, kernel)
    assert isinstance(backbone.maxpool, nn.Identity) == (kernel == 3)


def test_stem_halves_what_it_should() -> None:
    """Images of 32 pixels reach the last layer with 4 x 4, or 1 x 1 with the large stem."""
    sizes = []
    for stem in ("cifar", "imagenet"):
        backbone = make_backbone("resnet18", stem=stem, channels=3, image_size=32)[0]
        last = backbone.get_submodule("layer4")
        last.register_forward_hook(lambda *call: sizes.append(call[2].shape[-1]))
        backbone(torch.randn(2, 3, 32, 32))
    assert sizes == [4, 1]


def test_residual_blocks_begin_as_the_identity() -> None:
    backbone = make_backbone("resnet50", channels=3, image_size=32)[0]
    block = backbone.get_submodule("layer1.1")
    x = torch.rand(2, 256, 4, 4)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("depth", [1, 2, 4, 6])
def test_depth_of_the_small_network(depth: int) -> None:
    """Catches one layer too many, and a width or a stride that the default did not have."""
    layers = list(make_backbone("small", channels=3, depth=depth)[0].modules())
    shapes = [(c.out_channels, c.stride[0]) for c in layers if isinstance(c, nn.Conv2d)]
    known = [(16, 1), (32, 2), (64, 2), (64, 1), (64, 1), (64, 1)]
    assert shapes == [*known[: depth - 1], (64, known[depth - 1][1])]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == depth


def test_unknown_network() -> None:
    with pytest.raises(
        NetworkError, match=r"^train: --network vgg is unknown; choose one of small,"
    ):
        make_backbone("vgg")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_library_that_is_not_installed(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(NetworkError) as caught:
        make_backbone(f"{library}/resnet18")
    assert str(caught.value) == (
        f"train: --network {library}/resnet18 needs {library}, which is not installed: "
        f"pip install {library}"
    )


class _Strange(nn.Module):
    """A network of three channels as the libraries make them, with a classifier."""

    def __init__(self, ends_flat: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(5, 1000)
        self.ends_flat = ends_flat

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.conv(images))
        output: Tensor = self.classifier(features.flatten(1)) if self.ends_flat else features
        return output


def _get_model(name: str, weights: None) -> nn.Module:
    assert weights is None  # nothing is downloaded
    if name == "unknown":
        raise ValueError("Unknown model unknown\nand a second line")
    return _Strange(ends_flat=name == "flat")


def test_torchvision_without_its_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    _install_fake_torchvision(monkeypatch)
    backbone, features = make_backbone("torchvision/flat", channels=3, image_size=8)
    assert features == 5
    assert backbone(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert backbone.training


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("unknown", 3, "train: --network torchvision/unknown: Unknown model unknown"),
        ("flat", 1, "train: --network torchvision/flat does not take images of 1 x 8 x 8: "),
        ("bent", 3, "train: --network torchvision/bent gives (1, 5, 1, 1) for an image, not "),
    ],
)
def test_networks_that_do_not_fit(
    name: str, channels: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install_fake_torchvision(monkeypatch)
    with pytest.raises(NetworkError) as caught:
        make_backbone(f"torchvision/{name}", channels=channels, image_size=8)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_timm_is_asked_for_features(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def create_model(name: str, **options: object) -> nn.Module:
        asked.update(options, name=name)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6))

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    _, features = make_backbone("timm/some.thing", channels=1, image_size=8)
    assert features == 6
    assert asked == dict(name="some.thing", pretrained=False, num_classes=0, in_chans=1)


def _install_fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    models = SimpleNamespace(get_model=_get_model)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
