"""Index arithmetic, by hand and against the truth: no processes, no layers."""

import math

import pytest
import torch

import truth
from shuffle_batchnorm import mixing_matrix, spectral_radius
from shuffle_batchnorm.norm.mixing import MODES, Options, block_sizes, make_plan, rotation
from shuffle_batchnorm.norm.statistics import find_way

WORLDS = [(1, 1), (1, 8), (2, 1), (2, 4), (3, 1), (3, 2), (4, 3), (16, 2)]
OFFSETS = [0, 1, -1, 2, 5, 7]


@pytest.mark.parametrize("n", range(12))
@pytest.mark.parametrize("per_group", [1, 2, 3, 8])
def test_block_sizes_are_those_of_tensor_split(n: int, per_group: int) -> None:
    """Catches blocks that ranks with unequal batches would cut differently."""
    cut = tuple(len(part) for part in torch.tensor_split(torch.zeros(n), per_group))
    assert block_sizes(3 * n, 3, per_group) == cut * 3


def _rotate(rows: dict[int, list[str]], world: tuple[int, int], shifts: tuple[int, ...]) -> None:
    """Move the rows of all ranks as all_to_all would, by each rank's own routes, in place."""
    routes = {rank: rotation(world[0], rank, world[1], shifts) for rank in rows}
    _deliver(rows, routes)
    _deliver_check(rows, world, shifts)
    _deliver(rows, {rank: route.inverse() for rank, route in routes.items()})


def _deliver(rows: dict[int, list[str]], routes: dict) -> None:  # type: ignore[type-arg]
    parcels = {}
    for rank, route in routes.items():
        leaving = [rows[rank][k] for k in route.send_order]
        for to, n in enumerate(route.send_splits):
            parcels[rank, to], leaving = leaving[:n], leaving[n:]
    for rank, route in routes.items():
        received = [row for sender in rows for row in parcels[sender, rank]]
        sizes = tuple(len(parcels[sender, rank]) for sender in rows)
        assert sizes == route.receive_splits
        rows[rank] = [received[k] for k in route.place_order]


def _deliver_check(
    rows: dict[int, list[str]], world: tuple[int, int], shifts: tuple[int, ...]
) -> None:
    size, groups = world
    for i in range(size * groups):
        for c, shift in enumerate(shifts):
            rank, j = divmod((i + shift) % (size * groups), groups)
            assert rows[rank][j * len(shifts) + c] == f"{i}.{c}"


@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_rows_arrive_and_come_back(world: tuple[int, int], offset: int) -> None:
    """Catches two ranks that order the rows of one message differently."""
    size, groups = world
    for mode in ("swap", "regroup"):
        plan = make_plan(Options(mode, groups, offset, 8), size, 0)
        rows = {
            rank: [f"{rank * groups + j}.{c}" for j in range(groups) for c in range(plan.per_group)]
            for rank in range(size)
        }
        start = {rank: list(row) for rank, row in rows.items()}
        _rotate(rows, world, plan.shifts)
        assert rows == start


@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("blocks", [2, 8, 64])
@pytest.mark.parametrize("batch", [24, 120])
def test_pools_of_one_process_begin_where_kernels_look(
    groups: int, offset: int, blocks: int, batch: int
) -> None:
    """Catches a guess of a pool's mean from another pool's samples, which costs digits."""
    plan = make_plan(Options("regroup", groups, offset, blocks), 1, 0).without_empty_blocks(batch)
    sizes, pools = plan.sizes(batch), find_way(plan).pools
    assert pools is not None
    assert pools.number == groups
    for p in range(groups):
        first = p * plan.per_group
        members = [block for block, owner in enumerate(pools.owners) if owner == p]
        assert pools.owners[first] == p
        assert sizes[first] == max(sizes)
        assert sorted(pools.order[first : first + plan.per_group]) == members
        assert sum(sizes[block] for block in members) == batch // groups


@pytest.mark.parametrize("world_size", [8, 64, 512, 4096])
def test_peers_and_rows_do_not_grow_with_the_world(world_size: int) -> None:
    """Catches traffic that grows with W: the seed's all_gathers."""
    for mode, most_peers in (("swap", 1), ("regroup", 7)):
        plan = make_plan(Options(mode, 1, 1, 8), world_size, 3)
        route = rotation(world_size, 3, 1, plan.shifts)
        remote = [n for rank, n in enumerate(route.send_splits) if n and rank != 3]
        assert len(remote) == most_peers
        assert sum(remote) == most_peers
        assert sum(route.receive_splits) == plan.per_group


def _matrix_of_truth(mode: str, total: int, n: int, offset: int, blocks: int) -> torch.Tensor:
    """Row p, column q: how much sample p's mean moves with sample q."""
    values = torch.zeros(total * n, 1, dtype=torch.float64, requires_grad=True)
    groups = list(values.chunk(total))
    rows = []
    for i, group in enumerate(truth.shuffled(groups, mode, offset, blocks, eps=1.0).outputs):
        for p in range(len(group)):
            # With all values 0 and eps 1, dy_p/dx_q is [p = q] less the share of q in the mean.
            (grad,) = torch.autograd.grad(group[p].sum(), values, retain_graph=True)
            own = torch.zeros(total * n, dtype=torch.float64)
            own[i * n + p] = 1
            rows.append(own - grad[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [(1, 4), (2, 2), (3, 1), (5, 1)], ids=str)
def test_mixing_matrix_is_that_of_the_truth(mode: str, world: tuple[int, int]) -> None:
    """Catches a picture of the modes that is not what the layer does."""
    size, groups = world
    for offset, blocks in ((1, 8), (2, 3), (-1, 2)):
        got = mixing_matrix(
            mode,
            world_size=size,
            groups=groups,
            batch_size=3 * groups,
            offset=offset,
            blocks=blocks,
        )
        want = _matrix_of_truth(mode, size * groups, 3, offset, blocks)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got.sum(dim=1), torch.ones(len(got), dtype=torch.float64))


def test_blocks_of_a_group_never_meet_again() -> None:
    """Catches an offset rule that leaves a sample more of its company than its own block."""
    for total in (8, 9, 32):
        for offset in (o for o in range(1, total) if math.gcd(o, total) == 1):
            shuffled = mixing_matrix(
                "regroup", world_size=total, groups=1, batch_size=8, offset=offset
            )
            together = (shuffled > 0) & (
                mixing_matrix("local", world_size=total, groups=1, batch_size=8) > 0
            )
            assert together.sum(dim=1).eq(1).all()  # 8 samples in 8 blocks: only itself


def test_spectral_radius_tells_stable_modes_from_growing_ones() -> None:
    """Catches I - M mistaken for M, and the promise that partitions are stable."""
    for mode in ("local", "sync", "regroup"):
        matrix = mixing_matrix(mode, world_size=4, groups=2, batch_size=16)
        assert spectral_radius(matrix) == pytest.approx(1, abs=1e-6)
    for total in (2, 3, 4, 5, 8):
        matrix = mixing_matrix("swap", world_size=total, groups=1, batch_size=1)
        # Eigenvalues of I - rotation are 1 - w over the roots of unity w.
        farthest = max(abs(1 - complex(math.cos(a), math.sin(a))) for a in _angles(total))
        assert spectral_radius(matrix) == pytest.approx(farthest)


def _angles(n: int) -> list[float]:
    return [2 * math.pi * k / n for k in range(n)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mode="roll"), "mixing_matrix: unknown mode 'roll', choose one of local, sync, swap"),
        (dict(groups=3), "mixing_matrix: batch_size 4 is not divisible by groups=3"),
        (dict(groups=0), "mixing_matrix: groups must be at least 1, got groups=0"),
        (dict(blocks=0), "mixing_matrix: blocks must be at least 1, got blocks=0"),
        (dict(batch_size=0), "mixing_matrix: world_size and batch_size must be at least 1"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, object], message: str) -> None:
    """Catches an error that does not say which call, value and rule."""
    good: dict[str, object] = dict(mode="swap", world_size=2, groups=1, batch_size=4)
    with pytest.raises(ValueError, match=message):
        mixing_matrix(**{**good, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"spectral_radius: expected a square matrix"):
        spectral_radius(torch.zeros(2, 3))
