"""Shapley values of games whose values are known, and the coverage of sampled intervals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm.probe.shapley import (
    EXACT,
    Coalition,
    draw_orders,
    list_coalitions,
    mean_intervals,
    shapley_values,
)

Game = Callable[[Coalition], float]


def _estimate(players: int, game: Game, seed: int = 0, pairs: int | None = None) -> Tensor:
    orders = draw_orders(players, seed, pairs)
    coalitions = list_coalitions(players, orders)
    return shapley_values(players, orders, {c: game(c) for c in coalitions})


def _exact(players: int, game: Game) -> Tensor:
    values = {c: game(c) for c in list_coalitions(players, [])}
    return shapley_values(players, [], values)[0]


def test_a_game_by_hand() -> None:
    """Two gloves on one hand, one on the other: the single one is worth 2/3 of a pair."""
    found = _exact(3, lambda c: float(0 in c and len(c) > 1))
    torch.testing.assert_close(found.tolist(), [2 / 3, 1 / 6, 1 / 6])


@pytest.mark.parametrize("players", [EXACT, EXACT + 1, 20])
def test_an_additive_game_gives_each_player_its_own(players: int) -> None:
    """Catches a control variate whose mean is not taken out again."""
    worth = torch.randn(players, dtype=torch.float64)
    rows = _estimate(players, lambda c: float(worth[list(c)].sum()))
    assert len(rows) == (1 if players <= EXACT else max(4, 64 // (players - 1)))
    torch.testing.assert_close(rows, worth.expand_as(rows))


def _root(players: int, seed: int) -> Game:
    """The length of a sum of vectors: few strong players, and some that take from it."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(players, 4, generator=generator) * torch.rand(players, 1).square()
    return lambda c: float(parts[list(c)].sum(dim=0).norm())


def test_estimates_are_unbiased_and_sum_to_the_whole() -> None:
    players, pairs = 9, 400
    game = _root(players, 1)
    rows = _estimate(players, game, pairs=pairs)
    whole = game(frozenset(range(players)))
    torch.testing.assert_close(rows.sum(dim=1), torch.full((pairs,), whole).double())
    error = rows.std(dim=0) / math.sqrt(pairs)
    assert ((rows.mean(dim=0) - _exact(players, game)).abs() < 4 * error).all()


def test_the_interval_covers_at_its_rate() -> None:
    """Catches an interval from orders as if the two of a pair were independent, among others."""
    players, covered, number = 9, 0, 0
    for seed in range(12):
        game = _root(players, seed)
        values = {c: game(c) for c in list_coalitions(players, [])}
        truth = shapley_values(players, [], values)[0].tolist()
        for draw in range(10):
            orders = draw_orders(players, 100 * seed + draw, pairs=5)
            spans = mean_intervals(shapley_values(players, orders, values), 0.95)
            covered += sum(low <= t <= high for (low, high), t in zip(spans, truth, strict=True))
            number += players
    assert 0.91 < covered / number < 0.985, covered / number


def test_the_interval_covers_where_two_players_are_all() -> None:
    """Catches four orders drawn by themselves: they often agree by chance (coverage 0.85)."""
    players, covered = 12, 0

    def game(c: Coalition) -> float:
        return (0 in c) * (1.0 if 1 in c else 0.3)

    for draw in range(100):
        orders = draw_orders(players, draw)
        needed = {c: game(c) for c in list_coalitions(players, orders)}
        spans = mean_intervals(shapley_values(players, orders, needed), 0.95)
        pairs = zip(spans[:2], (0.65, 0.35), strict=True)
        covered += sum(low <= truth <= high for (low, high), truth in pairs)
    assert covered / 200 > 0.94, covered / 200


def test_one_row_has_no_width() -> None:
    assert mean_intervals(torch.tensor([[1.0, -2.0]]), 0.95) == [(1, 1), (-2, -2)]


def test_the_seed_decides() -> None:
    assert draw_orders(10, 3) == draw_orders(10, 3) != draw_orders(10, 4)
