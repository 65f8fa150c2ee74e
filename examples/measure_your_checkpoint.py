"""Measure the leak of a MoCo checkpoint: how far its keys are found by the statistics of a batch.

    python examples/moco_v2.py --steps 200                       # writes a moco_v2.pt to try it on
    python examples/measure_your_checkpoint.py moco_v2.pt
    python examples/measure_your_checkpoint.py YOURS.pth.tar --arch resnet50 --data FOLDER

It reads a `state_dict` with the names of facebookresearch/moco (``module.encoder_q.``,
``module.encoder_k.``, ``queue``), and prints what its keys leak with plain batch norm, with
MoCo's shuffle, and with `regroup`. Nothing is trained. The groups stand for the devices of the
training: give its batch size per device as --samples-per-group.
"""

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from shuffle_batchnorm import LeakReport, ShuffleBatchNorm, ShuffledEncoder, measure_leak

convert = ShuffleBatchNorm.convert_shuffle_batchnorm


class Checkpoint(NamedTuple):
    """Both encoders with plain batch norm in training mode, and the queue ``[K, D]``."""

    encoder_q: nn.Module
    encoder_k: nn.Module
    queue: Tensor


def read(path: Path, arch: str) -> Checkpoint:
    """Read the encoders and the queue of a checkpoint. Put your network in place of `network`."""
    saved = torch.load(path, map_location="cpu")
    saved = saved.get("state_dict", saved)
    state = {name.removeprefix("module."): value for name, value in saved.items()}
    for part in ("encoder_q.", "encoder_k.", "queue"):
        if not any(name.startswith(part) for name in state):
            raise SystemExit(f"{path}: no parameter's name begins with {part}; adapt `read`")

    def encoder(prefix: str) -> nn.Module:
        own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        module = common.network(arch)
        if "fc.weight" in own:  # MoCo v1: a linear head
            module.fc = nn.Linear(own["fc.weight"].shape[1], own["fc.weight"].shape[0])
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            wrong = str(error).splitlines()[1].strip()
            raise SystemExit(
                f"{path}: not --arch {arch}; your network goes here: {wrong}"
            ) from None
        return module

    queue = state["queue"]
    is_column = queue[:, 0].norm().isclose(torch.ones(()), atol=1e-2)  # as facebookresearch/moco
    queue = queue.T if is_column else queue
    return Checkpoint(encoder("encoder_q."), encoder("encoder_k."), queue)


def key_encoders(encoder: nn.Module, groups: int) -> dict[str, nn.Module]:
    """Return the key encoder with each way to normalise keys."""
    plain, regrouped = copy.deepcopy(encoder), copy.deepcopy(encoder)
    plain = convert(plain, mode="local", groups=groups)
    return {
        "plain batch norm": plain,
        "MoCo's shuffle": ShuffledEncoder(plain),
        "regroup": convert(regrouped, mode="regroup", groups=groups),
    }


def leak_of(
    query: nn.Module,
    key: nn.Module,
    queue: Tensor,
    args: argparse.Namespace,
    by_layer: bool = False,
) -> LeakReport:
    """Measure the leak against the queue; all ranks call it."""
    views = common.augmentation(args.data)

    def augment(images: Tensor) -> Tensor:
        return views(images).to(queue.device)

    def encode_query(images: Tensor) -> Tensor:
        return F.normalize(query(images), dim=1)

    def encode_key(images: Tensor) -> Tensor:
        return F.normalize(key(images), dim=1)

    return measure_leak(
        encode_query,
        encode_key,
        common.open_images(args.data, side=256),
        augment,
        queue,
        batch_size=args.groups * args.samples_per_group,
        batches=args.batches,
        keys_per_batch=2 * args.groups,
        keys_per_pass=args.groups,  # one of each group
        by_layer=by_layer,
    )


def parse(description: str | None) -> argparse.Namespace:
    parser = common.flags(description)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--samples-per-group", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16, help="in which a leak is measured")
    return parser.parse_args()


def main() -> None:
    args = parse(__doc__)
    device = common.join_ranks()
    rank, _ = common.rank_of_world()
    saved = read(args.checkpoint, args.arch)
    groups = common.groups_of_rank(args.groups)
    queue = saved.queue.to(device)
    query = convert(saved.encoder_q, mode="local", groups=groups).to(device)
    for name, key in key_encoders(saved.encoder_k, groups).items():
        key.to(device)
        report = leak_of(query, key, queue, args)
        if rank == 0:
            print(f"{name}: {report}")
    common.leave_ranks()


if __name__ == "__main__":
    main()
