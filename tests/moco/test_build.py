"""From a configuration to a model: which batch norm the two encoders get."""

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm, ShuffledEncoder
from shuffle_batchnorm.moco.build import Views, build_model, normalise_key, normalise_query
from shuffle_batchnorm.moco.config import Config, DataConfig, Norm, NormConfig
from shuffle_batchnorm.moco.data.loading import load_data
from shuffle_batchnorm.moco.networks import NetworkError
from shuffle_batchnorm.moco.ranks.launch import Rank


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12))


def _layers(encoder: nn.Module) -> list[ShuffleBatchNorm]:
    return [module for module in encoder.modules() if isinstance(module, ShuffleBatchNorm)]


@pytest.mark.parametrize(
    ("bn", "query", "key"),
    [
        ("local", "local", "local"),
        ("sync", "sync", "sync"),
        ("swap", "local", "swap"),
        ("regroup", "local", "regroup"),
        ("batch-shuffle", "local", "local"),
        ("eman", "local", "local"),
        ("simclr", "sync", "sync"),
    ],
)
def test_modes(bn: Norm, query: str, key: str) -> None:
    norm = NormConfig(bn=bn, groups=4, blocks=2, offset=3)
    encoders = normalise_query(_encoder(), norm), normalise_key(_encoder(), norm)
    for encoder, mode in zip(encoders, (query, key), strict=True):
        options = [(m.mode, m.groups, m.blocks, m.offset) for m in _layers(encoder)]
        assert options == [(mode, 4, 2, 3)] * 2
    assert isinstance(encoders[1], ShuffledEncoder) == (bn == "batch-shuffle")
    assert not isinstance(encoders[0], ShuffledEncoder)


def test_layers_that_are_not_named_are_local() -> None:
    """Catches a name that is taken for the beginning of one, and layers left without groups."""
    norm = NormConfig(bn="regroup", groups=4, blocks=2, layers="3, 1")
    assert [layer.mode for layer in _layers(normalise_key(_encoder(), norm))] == ["regroup"] * 2
    norm = NormConfig(bn="swap", groups=4, layers="3")
    for encoder, modes in (
        (normalise_key(_encoder(), norm), ["local", "swap"]),
        (normalise_query(_encoder(), norm), ["local", "local"]),
    ):
        assert [(layer.mode, layer.groups) for layer in _layers(encoder)] == [
            (mode, 4) for mode in modes
        ]


@pytest.mark.parametrize("name", ["0", "", "bn"])
def test_a_layer_that_is_not_there_is_refused(name: str) -> None:
    """A convolution, too; the error says what there is, for names are the network's own."""
    message = f"train: --layers: {name!r} is no batch norm layer; there are 1, 3"
    with pytest.raises(NetworkError, match=f"^{message}$"):
        normalise_key(_encoder(), NormConfig(layers=f"1,{name}"))


def test_batch_shuffle_mixes_the_groups_of_one_rank() -> None:
    """Catches a shuffle around layers whose group is the whole batch, which does nothing."""
    x = torch.randn(8, 1, 4, 4)
    norm = NormConfig(bn="batch-shuffle", groups=4)
    query, key = normalise_query(_encoder(), norm), normalise_key(_encoder(), norm)
    assert not torch.allclose(query(x), key(x), atol=1e-3)
    torch.testing.assert_close(query.eval()(x), key.eval()(x), atol=0.5, rtol=0.5)


def test_keys_of_eman_depend_on_no_other_sample() -> None:
    """Catches layers that train() brings back to batch statistics, and queries without these."""
    norm = NormConfig(bn="eman", groups=2)
    query, key = normalise_query(_encoder(), norm), normalise_key(_encoder(), norm)
    x, others = torch.randn(2, 8, 1, 4, 4)
    others[3] = x[3]
    for _ in "12":
        assert torch.equal(key(x)[3], key(others)[3])
        assert not torch.equal(query(x)[3], query(others)[3])
        nn.ModuleList([query, key]).train()


def test_statistics_of_eman_follow_from_those_of_images_on() -> None:
    """Catches keys that are normalised by what the network began with, for hundreds of steps."""
    kinds: dict[Norm, str] = {"eman": "momentum", "regroup": "own"}
    images = load_data(DataConfig())
    views = Views(Config(), images, Rank(0, 1, torch.device("cpu")))
    some = views.some(256)
    assert some.shape == (256, 1, 16, 16)
    # Not the first ones: folders come class by class.
    last = images.train[255 * len(images.train) // 256][0]  # type: ignore[arg-type]
    torch.testing.assert_close(some[-1:], views.as_they_are(last[None]))
    for bn, buffers in kinds.items():
        model = build_model(Config(norm=NormConfig(bn=bn)), images, torch.device("cpu"))
        assert model.buffers_follow == buffers
        for encoder in (model.encoder_q, model.encoder_k):
            backbone: Any = encoder.backbone
            convolution, norm = backbone.layers[:2]
            begins_with = convolution(some).mean((0, 2, 3)) if bn == "eman" else torch.zeros(16)
            torch.testing.assert_close(norm.running_mean, begins_with)
            assert norm.groups == 8
        query: Any = model.encoder_q.get_submodule("backbone.layers.1")
        assert query.momentum == 0.1


def test_negatives_of_simclr_are_in_the_batch_without_a_flag() -> None:
    images: Any = MagicMock(channels=1, image_size=8)
    kinds: dict[Norm, bool] = {"simclr": True, "sync": False}
    for bn, in_batch in kinds.items():
        config = Config(norm=NormConfig(bn=bn))
        assert build_model(config, images, torch.device("cpu")).in_batch == in_batch


def test_another_kind_of_batch_norm_is_refused() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    with pytest.raises(NetworkError, match=r"^train: --bn regroup: .*Own") as caught:
        normalise_key(nn.Sequential(Own(3)), NormConfig())
    assert "\n" not in str(caught.value)


def test_a_network_without_batch_norm_is_refused() -> None:
    """Catches a flag that does nothing, which is found out when the training is over."""
    for normalise in (normalise_query, normalise_key):
        with pytest.raises(NetworkError, match=r"^train: --network has no batch norm layer"):
            normalise(nn.Sequential(nn.Linear(2, 2)), NormConfig())
