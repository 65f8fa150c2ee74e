"""Index arithmetic, by hand and against the truth: no processes, no layers."""

import math
from typing import Any

import pytest
import torch

import truth
from shuffle_batchnorm import mixing_matrix, spectral_radius
from shuffle_batchnorm.norm.mixing import MODES, Options, block_sizes, make_plan
from shuffle_batchnorm.norm.statistics import RowFormat, prepare_local

OFFSETS = [0, 1, -1, 2, 5, 7]


@pytest.mark.parametrize("n", range(12))
@pytest.mark.parametrize("per_group", [1, 2, 3, 8])
def test_block_sizes_are_those_of_tensor_split(n: int, per_group: int) -> None:
    """Catches blocks that ranks with unequal batches would cut differently."""
    cut = tuple(len(part) for part in torch.tensor_split(torch.zeros(n), per_group))
    assert block_sizes(3 * n, 3, per_group) == cut * 3


@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("blocks", [2, 8, 64])
def test_groups_of_one_process_have_equal_shares(groups: int, offset: int, blocks: int) -> None:
    """Catches groups of blocks of different sizes, which kernels divide by one number."""
    for batch in (24, 120):
        plan = make_plan(Options("regroup", groups, offset, blocks), 1, 0)
        plan = plan.without_empty_blocks(batch)
        sizes = plan.sizes(batch)
        call = prepare_local(plan, torch.ones(batch, 3), 1.0, RowFormat(3, torch.float32), ())
        found = call.local.groups
        if not plan.shuffles:
            assert found is None
            assert sizes == (batch // groups,) * groups
            continue
        assert found is not None
        for group in range(groups):
            members = [block for block, owner in enumerate(found.owners) if owner == group]
            assert len(members) == plan.per_group
            assert sum(sizes[block] for block in members) == batch // groups


def test_what_shuffles_nothing_has_whole_groups() -> None:
    """Catches blocks that are cut, and merged again, for nothing."""
    for options in (
        Options("regroup", 4, 0),
        Options("regroup", 4, 8),
        Options("regroup", 4, 1, 1),
    ):
        assert make_plan(options, 2, 1)[4:] == (1, (0,), (0,))


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
    """Catches an offset rule that leaves a sample more of its old batch than its own block."""
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


def test_the_default_device_does_not_matter() -> None:
    """Catches a matrix made where it can't be read."""
    options: dict[str, Any] = dict(world_size=2, groups=2, batch_size=4)
    want = mixing_matrix("regroup", **options)
    with torch.device("meta"):
        got = mixing_matrix("regroup", **options)
        assert spectral_radius(got) == spectral_radius(want)
    assert torch.equal(got, want)
