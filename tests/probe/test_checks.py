"""Bad input ends the probe with an error that names the call, the value and the rule."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.known_leaks import one_thread
from shuffle_batchnorm import ShuffleBatchNorm, measure_leak

__all__ = ["one_thread"]  # a fixture

IMAGES, QUEUE = torch.randn(40, 6), torch.randn(5, 6)


def _identity(x: Tensor) -> Tensor:
    return x


def _call(**changed: Any) -> Any:
    defaults = dict(encode_query=_identity, encode_key=_identity, images=IMAGES, queue=QUEUE)
    sizes = dict(batch_size=16, batches=8, keys_per_batch=8)
    arguments: dict[str, Any] = {**defaults, **sizes, **changed}
    return measure_leak(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(batch_size=24), "40 images are too few for fresh batches: a batch of 24 and 23 oth"),
        (dict(images=IMAGES[:30]), "30 images are too few .* 16 and 15 others take 31"),
        (dict(batch_size=1), "batch_size must be at least 2, got 1"),
        (dict(batches=1), "batches must be at least 2, got 1"),
        (dict(batches=True), "batches must be an int, got True"),
        (dict(keys_per_batch=17), "keys_per_batch 17 is larger than batch_size 16"),
        (dict(keys_per_pass=3), "keys_per_batch 8 is not divisible by keys_per_pass 3"),
        (dict(keys_per_batch=16, keys_per_pass=16), "keys_per_pass 16 leaves no other sample"),
        (dict(keys_per_batch=None, keys_per_pass=17), "keys_per_pass 17 leaves no other sample"),
        (dict(keys_per_pass=0), "keys_per_pass must be at least 1, got 0"),
        (dict(queue=None, keys_per_batch=1), "keys_per_batch must be at least 2, got 1"),
        (dict(queue=QUEUE[:, :4]), r"\[16, 4\], got shape \(16, 6\); the queue must be \[K, D\]"),
        (dict(queue=QUEUE[0]), r"queue must be \[K, D\], got shape \(6,\)"),
        (dict(queue=QUEUE[:0]), r"queue must be \[K, D\], got shape \(0, 6\)"),
        (dict(queue=QUEUE.long()), "queue must be a floating-point tensor .* got torch.int64"),
        (dict(queue=QUEUE / 0), "queue has numbers that are not finite"),
        (dict(confidence=95), "confidence must be from 0.5 to below 1, got 95"),
        (dict(resamples=10), "resamples must be an int of at least 100, got 10"),
        (dict(images=3), "images must be a tensor .* or a data set with a length, got int"),
        (dict(images=torch.ones(())), "images must have a leading dimension, got a scalar"),
        (dict(augment=lambda x: x[1:]), r"augment must return a tensor of 16 samples, got \(15, 6"),
        (dict(encode_key=lambda x: x[1:]), r"encode_key must return \[16, 6\], got shape \(15, 6"),
        (dict(encode_key=lambda x: x[:, 1:]), r"encode_key must return \[16, 6\], got shape"),
        (dict(encode_key=lambda x: x.long()), "encode_key must return a floating-point tensor"),
        (dict(encode_key=lambda x: [x]), "encode_key must return a floating-point .* got list"),
        (dict(encode_query=lambda x: x / 0), "encode_query returned features that are not finite"),
    ],
)  # fmt: skip
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"measure_leak: .*{message}"):
        _call(**changed)


def test_an_encoder_in_eval_mode_is_refused() -> None:
    """There no sample depends on the others, and the leak would be 0 whatever is trained."""
    encoder = nn.Sequential(nn.Linear(6, 6), ShuffleBatchNorm(6), ShuffleBatchNorm(6))
    assert _call(encode_key=encoder).keys
    encoder[1].eval()  # a frozen layer among others is somebody's choice
    assert _call(encode_key=encoder).keys
    encoder.eval()
    for name in ("encode_query", "encode_key"):
        message = rf"measure_leak: {name} has its batch norm layers in eval mode \(layer '1'\)"
        with pytest.raises(ValueError, match=message):
            _call(**{name: lambda x: 1 * encoder(x)})
    untracked = nn.BatchNorm1d(6, track_running_stats=False).eval()  # uses the batch all the same
    assert _call(encode_key=untracked).keys
