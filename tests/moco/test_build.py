"""From a configuration to a model: which batch norm the two encoders get."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm, ShuffledEncoder
from shuffle_batchnorm.moco.build import build_model, normalise_key, normalise_query
from shuffle_batchnorm.moco.config import Config, Norm, NormConfig
from shuffle_batchnorm.moco.networks import NetworkError


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12))


@pytest.mark.parametrize(
    ("bn", "query", "key"),
    [
        ("local", "local", "local"),
        ("sync", "sync", "sync"),
        ("swap", "local", "swap"),
        ("regroup", "local", "regroup"),
        ("batch-shuffle", "local", "local"),
        ("eman", "local", "local"),
    ],
)
def test_modes(bn: Norm, query: str, key: str) -> None:
    norm = NormConfig(bn=bn, groups=4, blocks=2, offset=3)
    encoders = normalise_query(_encoder(), norm), normalise_key(_encoder(), norm)
    for encoder, mode in zip(encoders, (query, key), strict=True):
        layers = [m for m in encoder.modules() if isinstance(m, ShuffleBatchNorm)]
        options = [(m.mode, m.groups, m.blocks, m.offset) for m in layers]
        assert options == [(mode, 4, 2, 3)] * 2
    assert isinstance(encoders[1], ShuffledEncoder) == (bn == "batch-shuffle")
    assert not isinstance(encoders[0], ShuffledEncoder)


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


def test_statistics_of_eman_follow_without_a_flag() -> None:
    """Catches keys that are normalised by what the network began with."""
    images: Any = SimpleNamespace(channels=1, image_size=8)
    kinds: dict[Norm, str] = {"eman": "momentum", "regroup": "own"}
    for bn, buffers in kinds.items():
        config = Config(norm=NormConfig(bn=bn))
        assert build_model(config, images, torch.device("cpu")).buffers_follow == buffers


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
