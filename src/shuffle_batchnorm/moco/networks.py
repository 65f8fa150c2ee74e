"""The networks: a small one for digits, ResNet-18 and -50, any of timm's and torchvision's."""

import importlib
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CALL, NetworkConfig, UserError

_LARGE = 64  # pixels; above it a ResNet begins with the stem for ImageNet


class NetworkError(UserError):
    """A network that doesn't exist, isn't installed or doesn't fit the images."""


class Encoder(nn.Module):
    r"""A backbone and a head that projects its features to unit length.

    .. math:: f(x) = \frac{h(b(x))}{\lVert h(b(x)) \rVert}

    Communication: that of the layers.

    Args:
        backbone: images ``[N, c, H, H]`` to features ``[N, D]``.
        head: features to ``[N, dim]``.

    Shape:
        Images ``[N, c, H, H]`` to ``[N, dim]``, in float32 or wider whatever autocast does.

    Example:
        >>> encoder = Encoder(nn.Flatten(), nn.Linear(64, 4))
        >>> encoder(torch.randn(2, 1, 8, 8)).norm(dim=1).allclose(torch.ones(2))
        True
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Encode. See the class."""
        projected: Tensor = self.head(self.backbone(images))
        if projected.dtype != torch.float64:
            projected = projected.float()
        return F.normalize(projected, dim=1)


def make_encoder(config: NetworkConfig, channels: int, image_size: int) -> Encoder:
    """Build an encoder with fresh weights: a backbone, and a head of one or two linear layers.

    The head is MoCo's: linear, or linear, ReLU, linear with `config.mlp` (MoCo v2).

    Args:
        config: network, stem, dimension and head.
        channels: c of the images.
        image_size: H of the images.

    Returns:
        An `Encoder` to ``[N, config.dim]``.

    Raises:
        NetworkError: see `make_backbone`.

    Source:
        Chen et al. 2020, arXiv 2003.04297.

    Example:
        >>> make_encoder(NetworkConfig(dim=16), 1, 16)(torch.randn(4, 1, 16, 16)).shape
        torch.Size([4, 16])
    """
    backbone, features = make_backbone(
        config.network,
        stem=config.stem,
        channels=channels,
        image_size=image_size,
        depth=config.depth,
    )
    head: nn.Module = nn.Linear(features, config.dim)
    if config.mlp:
        head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), head)
    return Encoder(backbone, head)


def make_backbone(
    network: str, *, stem: str = "auto", channels: int = 3, image_size: int = 32, depth: int = 4
) -> tuple[nn.Module, int]:
    """Build a backbone by name, with fresh weights.

    Args:
        network: ``small``, ``resnet18``, ``resnet50``, ``timm/<name>`` or ``torchvision/<name>``.
            The ResNets' parameters have torchvision's names; there is no ``fc``.
        stem: of a ResNet: ``cifar``, a 3x3 convolution; ``imagenet``, 7x7 with stride 2 and a
            maximum of 3x3; ``auto``, cifar up to 64 pixels.
        channels: c of the images.
        image_size: H of the images.
        depth: convolutions of ``small``.

    Returns:
        The backbone, ``[N, c, H, H]`` to ``[N, D]``, and D.

    Raises:
        NetworkError: an unknown name, a library that is not installed, or a network that does not
            take such images.

    Example:
        >>> make_backbone("resnet18", channels=3, image_size=32)[1]
        512
    """
    library, _, name = network.rpartition("/")
    if library in ("timm", "torchvision"):
        return _from_library(library, name, channels, image_size)
    if network == "small":
        return SmallNet(channels, depth), SmallNet.FEATURES
    if network in _RESNETS:
        large = image_size > _LARGE if stem == "auto" else stem == "imagenet"
        resnet = ResNet(*_RESNETS[network], channels=channels, large_stem=large)
        return resnet, resnet.features
    known = ", ".join(["small", *_RESNETS, "timm/<name>", "torchvision/<name>"])
    raise NetworkError(f"{CALL}: --network {network} is unknown; choose one of {known}")


class SmallNet(nn.Module):
    """A few convolutions with batch norm, ``[N, c, 16, 16]`` to ``[N, 64]`` in a moment.

    The first has 16 channels, the second 32, the others and the last 64; the second and the third
    halve the side.

    Args:
        channels: c of the images.
        depth: how many convolutions, 1 or more.

    Shape:
        Images ``[N, c, H, H]`` with H of 8 or more, to ``[N, 64]``.
    """

    FEATURES = 64

    def __init__(self, channels: int, depth: int = 4) -> None:
        super().__init__()
        hidden = (16, 32, *[self.FEATURES] * depth)[: depth - 1]
        layers: list[nn.Module] = []
        for position, (inputs, outputs) in enumerate(pairwise((channels, *hidden, self.FEATURES))):
            stride = 2 if 0 < position < 3 else 1
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Encode. See the class."""
        return F.adaptive_avg_pool2d(self.layers(images), 1).flatten(1)


class _Block(nn.Module):
    """A residual block of convolutions, each with batch norm, from `width` to `outputs` channels.

    `convN`, `bnN` and `downsample` are torchvision's names.
    """

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        # Kernel, stride and width of the convolutions: two 3x3, or 1x1, 3x3, 1x1 as a bottleneck.
        if outputs == width:
            shapes = [(3, stride, width), (3, 1, outputs)]
        else:
            shapes = [(1, 1, width), (3, stride, width), (1, 1, outputs)]
        self.depth = len(shapes)
        before = inputs
        for number, (kernel, step, after) in enumerate(shapes, 1):
            self.add_module(f"conv{number}", _convolution(before, after, kernel, step))
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
            before = after
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                _convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.depth:
                y = F.relu(y)
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut)


# How many times wider a block ends, and how many blocks there are in each of the four layers.
_RESNETS = {"resnet18": (1, (2, 2, 2, 2)), "resnet50": (4, (3, 4, 6, 3))}


class ResNet(nn.Module):
    """A residual network without its classifier, with torchvision's names of parameters.

    Args:
        expansion: how many times wider a block ends.
        blocks: how many there are in each of the four layers.
        channels: c of the images.
        large_stem: begin with a 7x7 convolution of stride 2 and a maximum of 3x3, for large images,
            and not with a 3x3 convolution.

    Shape:
        Images ``[N, c, H, H]`` to ``[N, features]``.

    Source:
        He et al. 2015, arXiv 1512.03385; stride in the 3x3 convolution and weights of 0 in the
        last batch norm of a block as in Goyal et al. 2017, arXiv 1706.02677.
    """

    def __init__(
        self,
        expansion: int,
        blocks: tuple[int, int, int, int],
        *,
        channels: int,
        large_stem: bool,
    ) -> None:
        super().__init__()
        if large_stem:
            self.conv1 = _convolution(channels, 64, 7, 2)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = _convolution(channels, 64, 3, 1)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, count in enumerate(blocks, 1):
            width, layer = 32 * 2**number, nn.Sequential()
            for position in range(count):
                stride = 2 if number > 1 and position == 0 else 1
                layer.append(_Block(inputs, width, expansion * width, stride))
                inputs = expansion * width
            self.add_module(f"layer{number}", layer)
        self.features = inputs
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block):
                last = getattr(module, f"bn{module.depth}")
                nn.init.zeros_(last.weight)  # every block begins as the identity

    def forward(self, images: Tensor) -> Tensor:
        """Encode. See the class."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _from_library(library: str, name: str, channels: int, image_size: int) -> tuple[nn.Module, int]:
    network = f"{library}/{name}"
    try:
        models = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError as error:
        raise NetworkError(
            f"{CALL}: --network {network} needs {library}, which is not installed: "
            f"pip install {library}"
        ) from error
    model: nn.Module
    try:
        if library == "timm":
            model = models.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
        else:
            model = models.get_model(name, weights=None)
    except Exception as error:
        raise NetworkError(f"{CALL}: --network {network}: {_first_line(error)}") from error
    if library == "torchvision":
        heads = [head for head in ("fc", "classifier", "heads", "head") if hasattr(model, head)]
        for head in heads[:1]:
            setattr(model, head, nn.Identity())
    return model, _features(model, network, channels, image_size)


@torch.no_grad()
def _features(model: nn.Module, network: str, channels: int, image_size: int) -> int:
    """Return D, found by encoding one image of zeros."""
    was_training = model.training
    model.eval()
    try:
        output = model(torch.zeros(1, channels, image_size, image_size))
    except Exception as error:
        size = f"{channels} x {image_size} x {image_size}"
        raise NetworkError(
            f"{CALL}: --network {network} does not take images of {size}: {_first_line(error)}"
        ) from error
    model.train(was_training)
    shape = tuple(getattr(output, "shape", ()))
    if len(shape) != 2:
        raise NetworkError(
            f"{CALL}: --network {network} gives {shape or type(output).__name__} for an image, "
            "not features (1, D)"
        )
    return int(shape[1])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
