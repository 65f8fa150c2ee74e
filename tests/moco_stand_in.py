"""A stand-in for somebody's copy of facebookresearch/moco's builder, written for our tests.

It has that class's constructor, the names of its methods, and the lines that the patch in
examples/ replaces; what else is in it is ours, and shorter.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def gather(rows: Tensor) -> Tensor:
    everyones = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, rows)
    return torch.cat(everyones)


class MoCo(nn.Module):
    queue: Tensor

    def __init__(self, base_encoder: type[nn.Module], dim: int = 8, K: int = 32) -> None:
        super().__init__()
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))

    def _momentum_update_key_encoder(self) -> None:
        pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        for key, query in pairs:
            key.lerp_(query, 0.01)

    def _batch_shuffle_ddp(self, images: Tensor) -> tuple[Tensor, Tensor]:
        everyones = gather(images)
        order = torch.randperm(len(everyones), generator=torch.Generator().manual_seed(0))
        return everyones[order.chunk(dist.get_world_size())[dist.get_rank()]], order

    def _batch_unshuffle_ddp(self, keys: Tensor, order: Tensor) -> Tensor:
        everyones = gather(keys)[order.argsort()]
        return everyones.chunk(dist.get_world_size())[dist.get_rank()]

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and the keys of this rank."""
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            im_k, idx_unshuffle = self._batch_shuffle_ddp(im_k)
            k = F.normalize(self.encoder_k(im_k), dim=1)
            k = self._batch_unshuffle_ddp(k, idx_unshuffle)
        positive = (q * k).sum(1, keepdim=True)
        return torch.cat([positive, q @ self.queue.clone()], dim=1) / 0.2, k
