"""The flag ``--bn``: what normalises queries, and what normalises keys."""

from torch import nn

from shuffle_batchnorm.norm.modules import ShuffleBatchNorm
from shuffle_batchnorm.shuffle.encoder import ShuffledEncoder

from .config import NormConfig
from .networks import NetworkError

CALL = "train"


def normalise_query(encoder: nn.Module, norm: NormConfig) -> nn.Module:
    """Give the query encoder its batch norm: of each group, or ``sync`` if the keys have it too.

    Communication: none here; that of mode ``sync`` in its layers.

    Args:
        encoder: with ``nn.BatchNorm`` layers; changed in place.
        norm: the mode of the keys, and how many groups there are on each rank.

    Returns:
        The encoder.

    Raises:
        NetworkError: a kind of batch norm that can't be converted, or none at all.

    Example:
        >>> normalise_query(nn.BatchNorm2d(3), NormConfig(bn="regroup", groups=16)).mode
        'local'
    """
    return _convert(encoder, norm, "sync" if norm.bn == "sync" else "local")


def normalise_key(encoder: nn.Module, norm: NormConfig) -> nn.Module:
    """Give the key encoder the batch norm that ``--bn`` names.

    Communication: none here. ``batch-shuffle`` moves samples and features at every call, the
    others rows of statistics in every layer, ``local`` nothing.

    Args:
        encoder: with ``nn.BatchNorm`` layers; changed in place.
        norm: mode, groups on each rank, blocks and offset.

    Returns:
        The encoder; for ``batch-shuffle`` inside a `ShuffledEncoder`, with groups of its own, so
        that one rank can shuffle among its virtual groups.

    Raises:
        NetworkError: a kind of batch norm that can't be converted, or none at all.

    Example:
        >>> normalise_key(nn.BatchNorm2d(3), NormConfig(bn="regroup", groups=16)).mode
        'regroup'
    """
    if norm.bn == "batch-shuffle":
        return ShuffledEncoder(_convert(encoder, norm, "local"))
    return _convert(encoder, norm, norm.bn)


def _convert(encoder: nn.Module, norm: NormConfig, mode: str) -> nn.Module:
    try:
        converted = ShuffleBatchNorm.convert_shuffle_batchnorm(
            encoder, mode=mode, groups=norm.groups, offset=norm.offset, blocks=norm.blocks
        )
    except TypeError as error:
        raise NetworkError(f"{CALL}: --bn {norm.bn}: {error}") from error
    if not any(isinstance(module, ShuffleBatchNorm) for module in converted.modules()):
        raise NetworkError(f"{CALL}: --network has no batch norm layer, so --bn would do nothing")
    return converted
