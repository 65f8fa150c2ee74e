"""Convert only a part of a key encoder, and measure what that leaves of the leak.

    python examples/moco_v2.py --steps 200      # writes a moco_v2.pt
    python examples/convert_part.py moco_v2.pt

`filter_fn` is asked for every batch norm. Here it takes layers in the order of their parts in the
leak, the largest first, and one more each time. Only the conversion of all of them leaves none for
certain. It is the checkpoint that is measured: nothing is trained.
"""

import copy
from collections.abc import Collection

from torch import nn

import common
from measure_your_checkpoint import leak_of, parse, read
from shuffle_batchnorm import ShuffleBatchNorm

convert = ShuffleBatchNorm.convert_shuffle_batchnorm


def convert_layers(encoder: nn.Module, layers: Collection[str], groups: int) -> nn.Module:
    """Return the key encoder with only these layers normalising with samples of other groups.

    Other filters: ``lambda _, name: not name.startswith("fc")`` leaves a head out, ``lambda
    module, _: module.num_features >= 256`` a ResNet's first layers.
    """
    encoder = convert(copy.deepcopy(encoder), mode="local", groups=groups)
    if layers:
        convert(encoder, mode="regroup", groups=groups, filter_fn=lambda _, name: name in layers)
    return encoder


def main() -> None:
    args = parse(__doc__)
    device = common.join_ranks()
    rank, _ = common.rank_of_world()
    groups = common.groups_of_rank(args.groups)
    saved = read(args.checkpoint, args.arch)
    query = convert(saved.encoder_q, mode="local", groups=groups).to(device)
    queue = saved.queue.to(device)

    plain = convert_layers(saved.encoder_k, [], groups).to(device)
    parts = leak_of(query, plain, queue, args, by_layer=True).by_layer
    order = sorted(parts, key=lambda name: parts[name], reverse=True)
    for count in range(len(order) + 1):
        key = convert_layers(saved.encoder_k, order[:count], groups).to(device)
        report = leak_of(query, key, queue, args)
        if rank == 0:
            print(f"{', '.join(order[:count]) or 'none'}: {report}")
    common.leave_ranks()


if __name__ == "__main__":
    main()
