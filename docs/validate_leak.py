"""Print the table of docs/leak.md: what the probe says of leaks that are known.

python docs/validate_leak.py
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shuffle_batchnorm import LeakReport, measure_leak

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from probe.known_leaks import Signature, accuracy_of_pairs, convolutional, deep_pairs, pool_of_ids


def _signature(exposed: float, known: float, run: int = 0, **sizes: Any) -> LeakReport:
    encoder, generator = Signature(exposed), torch.Generator().manual_seed(run)
    pool = pool_of_ids(1000, known, seed=run)
    sizes = dict(batch_size=16, keys_per_batch=8, keys_per_pass=8) | sizes
    encoders = encoder.query, encoder.key
    return measure_leak(*encoders, pool, None, encoder.queue, generator=generator, **sizes)


def known_leaks() -> None:
    for known, exposed in ((0.5, 0.0), (0.0, 1.0), (0.3, 0.4), (0.5, 0.8)):
        truth = (1 - known) * exposed
        print(f"signature, leak {truth:.3f}: {_signature(exposed, known, batches=64)}")
    images = torch.randn(1000, 16).double()
    for length in (64, 0):
        queue = torch.randn(length, 16).double().sign() if length else None
        truth = 1 - accuracy_of_pairs(16, length or 15)
        encoder = deep_pairs(16, depth=20, groups=16)
        sizes: dict[str, Any] = dict(batch_size=32, keys_per_batch=16, keys_per_pass=16)
        report = measure_leak(encoder, encoder, images, None, queue, batches=64, **sizes)
        print(f"20 layers, queue of {length}, leak {truth:.3f}: {report}")


def coverage(runs: int = 400) -> None:
    exposed, known = 0.5, 0.3
    warnings.filterwarnings("ignore", "measure_leak: . batches are too few")
    for batches in (2, 4, 8, 16, 32):
        sizes = dict(batches=batches, keys_per_batch=4, keys_per_pass=4)
        intervals = [_signature(exposed, known, run, **sizes).interval for run in range(runs)]
        truth = (1 - known) * exposed
        covered = sum(low <= truth <= high for low, high in intervals) / runs
        width = sum(high - low for low, high in intervals) / runs
        print(f"{batches} batches: covers in {100 * covered:.1f} % of {runs}, width {width:.2f}")


def networks() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)

    def normalised(encoder: nn.Module) -> Any:
        return lambda x: F.normalize(encoder(x), dim=1)

    images = torch.randn(512, 3, 6, 6)
    for queries, keys in (("local", "local"), ("local", "regroup"), ("sync", "sync")):
        query, key = (normalised(convolutional(mode, groups=16)) for mode in (queries, keys))
        with torch.no_grad():
            batches = [images[torch.randperm(512)[:64]] for _ in range(4)]
            queue = torch.cat([key(noisy(x)) for x in batches])
        for per_pass in (1, 16):
            sizes: dict[str, Any] = dict(batch_size=64, batches=32, keys_per_batch=16)
            report = measure_leak(query, key, images, noisy, queue, keys_per_pass=per_pass, **sizes)
            print(f"{keys}, {per_pass} keys per pass: {report}")


def main() -> None:
    torch.set_num_threads(1)  # the tensors are small
    torch.manual_seed(0)
    known_leaks()
    networks()
    coverage()


if __name__ == "__main__":
    main()
