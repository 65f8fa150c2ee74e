"""Find the modules through which samples of a batch see each other, with `audit`.

    python examples/which_layers_mix.py
    python examples/which_layers_mix.py --arch resnet50      # needs torchvision

Any model will do, with no labels and no training: classes of layers don't matter. The model here
has batch norm, a layer norm, and attention over the batch. Then the same in eval mode, where batch
norm mixes no longer; and for what is left it is not batch norm that has to be changed.
"""

import torch
from torch import Tensor, nn

import common
from shuffle_batchnorm import audit


class AttentionOverBatch(nn.Module):
    """Attends from each sample to all samples of its batch, by mistake or not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads=4)

    def forward(self, features: Tensor) -> Tensor:
        # [N, D] is taken for one sequence of N tokens.
        attended: Tensor = self.attention(features, features, features, need_weights=False)[0]
        return features + attended


def model(arch: str) -> nn.Module:
    return nn.Sequential(common.network(arch), nn.LayerNorm(128), AttentionOverBatch(128))


def main() -> None:
    args = common.flags(__doc__).parse_args()
    device = common.join_ranks()
    rank, world = common.rank_of_world()
    torch.manual_seed(0)
    audited = model(args.arch).to(device)
    images = common.Digits().images.to(device)[rank::world][: args.batch_size]
    for when, is_training in ("training", True), ("eval", False):
        report = audit(audited.train(is_training), images)
        if rank == 0:
            print(f"in {when} mode: {report}")
    common.leave_ranks()


if __name__ == "__main__":
    main()
