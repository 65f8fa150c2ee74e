"""One step of MoCo in which no image crosses the network: each rank loads the keys it encodes.

    torchrun --nproc-per-node 2 examples/shuffle_by_loading.py

Without torchrun it runs as one rank, with two virtual groups in each batch norm.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from shuffle_batchnorm import ShuffleBatchNorm, ShuffledPairSampler, batch_unshuffle


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)  # a dataset that augments at random yields two views
    query_encoder, key_encoder = (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            ShuffleBatchNorm(8, mode="local", groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 7 * 7, 32),
        )
        for _ in range(2)
    )
    key_encoder.load_state_dict(query_encoder.state_dict())

    sampler = ShuffledPairSampler(images, batch_size=8, seed=0)
    loader = DataLoader(sampler.dataset, batch_sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for step, (queries, keys) in enumerate(loader):
            q = F.normalize(query_encoder(queries), dim=1)
            with torch.no_grad():
                k = F.normalize(key_encoder(keys), dim=1)
                k = batch_unshuffle(k, sampler.plan(step))  # now k[i] is the key of q[i]
            loss = F.cross_entropy(q @ k.t() / 0.1, torch.arange(len(q)))
            query_encoder.zero_grad()
            loss.backward()
        print(f"epoch {epoch}: loss {loss.item():.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
