"""What ranks agree on depends on calls that all of them make, not on what one does by itself."""

import copy
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import truth
from ranks import impatient, new_group, run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, shuffle_batch_norm
from truth import gradient


def _x(*shape: int, rank: int | None = None) -> Tensor:
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * (rank + 1)


def _moves_alone() -> int:
    layer = ShuffleBatchNorm(4, dtype=torch.float64)
    for _ in range(3):
        layer(_x(4, 4)).sum().backward()
        if dist.get_rank() == 0:  # as before a checkpoint
            layer.cpu()
            layer = copy.deepcopy(layer)
    assert layer.num_batches_tracked is not None
    return int(layer.num_batches_tracked)


def test_one_rank_may_move_or_copy_its_layer() -> None:
    """Catches a comparison of options that one rank starts alone."""
    assert run_on_ranks(2, _moves_alone) == [3, 3]


def _calls_otherwise(change: str) -> str:
    rank = dist.get_rank()
    group = new_group()
    shuffle_batch_norm(_x(4, 4), None, None, training=True, process_group=group)
    x = (
        _x(4, 4 + rank)
        if change == "channels"
        else _x(4, 4).to([torch.float64, torch.float32][rank])
    )
    start = time.monotonic()
    try:
        with impatient():
            shuffle_batch_norm(x, None, None, training=True, process_group=group)
    except RuntimeError as error:
        assert time.monotonic() - start < 20
        return str(error)
    return "nothing"


@pytest.mark.parametrize("change", ["channels", "dtype"])
def test_a_form_that_one_rank_changes_later_ends_all(change: str) -> None:
    """Catches one rank that compares options while the other exchanges rows: neither would end."""
    for message in run_on_ranks(2, _calls_otherwise, change):
        assert "ranks are at different calls: rank" in message
        assert "compares its shuffle_batch_norm with its peers'" in message
        assert "exchanges rows of 9 numbers in mode 'swap'" in message


def _groups_with_reused_names() -> list[str]:
    layer = ShuffleBatchNorm(4, dtype=torch.float64)
    names = []
    for members in ([0, 1], [0, 2], [1, 2]):
        group = dist.new_group(members)
        if dist.get_rank() in members:
            layer.process_group = group
            layer(_x(4, 4)).sum().backward()
            names.append(group.group_name)
            dist.destroy_process_group(group)
    return names


def test_a_new_group_agrees_anew() -> None:
    """Catches agreements kept by a group's name, which its successor may have."""
    run_on_ranks(3, _groups_with_reused_names)


def _in_groups(kind: str, mode: str) -> tuple[Tensor, Tensor, int, int]:
    """Train a layer on a part of four ranks; say also which part, and the place in it."""
    rank = dist.get_rank()
    part, place = divmod(rank, 2)
    handle: Any
    if kind == "groups":
        handle = [dist.new_group(members) for members in ([0, 1], [2, 3])][part]
    elif kind == "reversed":
        handle = [dist.new_group(members) for members in ([0, 2], [1, 3])][rank % 2]
        part, place = rank % 2, rank // 2
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "data"))
        handle = mesh["data"]
    layer = ShuffleBatchNorm(3, process_group=handle, mode=mode, groups=2, dtype=torch.float64)
    x = _x(8, 3, 2).requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    return y.detach(), gradient(x), part, place


@pytest.mark.parametrize("kind", ["groups", "reversed", "mesh"])
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_layers_on_parts_of_the_ranks(kind: str, mode: str) -> None:
    """Catches global ranks taken for ranks in the group, and groups that mix."""
    results = run_on_ranks(4, _in_groups, kind, mode)
    for part in (0, 1):
        ranks = [r for r in range(4) if results[r][2] == part]
        xs = [_x(8, 3, 2, rank=r).requires_grad_() for r in ranks]
        plain = truth.shuffled([g for x in xs for g in x.chunk(2)], mode)
        torch.cat(plain.outputs).pow(3).sum().backward()
        got = torch.cat([results[r][0] for r in ranks])
        torch.testing.assert_close(got, torch.cat(plain.outputs).detach())
        for r, x in zip(ranks, xs, strict=True):
            torch.testing.assert_close(results[r][1], gradient(x), rtol=1e-9, atol=1e-10)
