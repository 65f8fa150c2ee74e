"""Shapley values: how much of a change each of several players brings about."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .intervals import student_quantile

EXACT = 8  # players up to which all coalitions are valued
_SAMPLED = 128  # coalitions of all orders together, with more players
_PAIRS = 4  # but no fewer pairs of orders than this
Coalition = frozenset[int]
Orders = Sequence[Sequence[int]]


def draw_orders(players: int, seed: int, pairs: int | None = None) -> Orders:
    """Draw orders in which players join a coalition: pairs of an order and its reverse.

    What a player adds depends on how early it joins; in a pair it is once as early as it is late
    the other time. Four pairs are turns of one order, by a quarter each: with few strong players,
    four orders drawn by themselves often let these join in the same way, and then agree by chance.

    Args:
        players: n.
        seed: of the draw.
        pairs: how many; None for 128 coalitions in all, but at least 4 pairs.

    Returns:
        ``2 * pairs`` orders; none for up to 8 players, whose coalitions are all valued.

    Source:
        Antithetic orders: Mitchell et al. 2022, "Sampling permutations for Shapley value
        estimation", JMLR 23(43).
    """
    if players <= EXACT:
        return []
    if pairs is None:
        pairs = max(_PAIRS, _SAMPLED // (2 * (players - 1)))
    generator = torch.Generator().manual_seed(seed)
    orders: list[list[int]] = []
    for k in range(pairs):
        if k % _PAIRS == 0:
            drawn = torch.randperm(players, generator=generator, device="cpu")
        order = drawn.roll(k % _PAIRS * players // _PAIRS).tolist()
        orders += [order, order[::-1]]
    return orders


def list_coalitions(players: int, orders: Orders) -> list[Coalition]:
    """Return the coalitions that have to be valued, each once.

    Without orders all; else what they pass through, each player alone, and all but one.

    Example:
        >>> [sorted(coalition) for coalition in list_coalitions(2, [])]
        [[], [0], [1], [0, 1]]
    """
    everyone = range(players)
    if not orders:
        sizes = range(players + 1)
        return [frozenset(c) for size in sizes for c in itertools.combinations(everyone, size)]
    found = [frozenset(order[:k]) for order in orders for k in range(players + 1)]
    found += [frozenset([player]) for player in everyone]
    found += [frozenset(everyone) - {player} for player in everyone]
    return list(dict.fromkeys(found))


def shapley_values(players: int, orders: Orders, values: Mapping[Coalition, float]) -> Tensor:
    r"""Return what each player contributes.

    .. math:: \phi_j = \sum_{S \not\ni j} \frac{|S|! \, (n - |S| - 1)!}{n!} (v(S \cup j) - v(S))

    which is the mean, over all orders in which players can join, of what v grows by when j does.
    A row sums to v of all players minus v of none.

    From orders it is estimated. What a player adds as the first and as the last to join is known
    exactly; between these, what it adds in an order is compared with a guess from both, of which
    the mean over all orders is known (a control variate), and a row's sum is set right in equal
    parts. On games with few strong players this halves the error, and the interval then covers.

    Args:
        players: n.
        orders: from `draw_orders`.
        values: v of what `list_coalitions` lists.

    Returns:
        Tensor ``[1, n]``, float64, exact, if there are no orders; else ``[pairs, n]``, the mean of
        each pair of orders.

    Source:
        Shapley 1953, "A value for n-person games".

    Example:
        >>> either = {frozenset(): 0.0, **dict.fromkeys(map(frozenset, ([0], [1], [0, 1])), 1.0)}
        >>> shapley_values(2, [], either).tolist()
        [[0.5, 0.5]]
    """
    if not orders:
        return _all_coalitions(players, values)
    everyone = frozenset(range(players))
    first = _row(values[frozenset([j])] - values[frozenset()] for j in range(players))
    last = _row(values[everyone] - values[everyone - {j}] for j in range(players))
    weights = _row((players / (k + 1) - 1) / (players - 1) for k in range(players))  # 1 down to 0
    rows = []
    for order in orders:
        steps = [values[frozenset(order[:k])] for k in range(players + 1)]
        added = _row(b - a for a, b in itertools.pairwise(steps))
        row = torch.empty_like(added)
        row[list(order)] = added - weights * (first - last)[list(order)]
        row += weights.mean() * (first - last)
        rows.append(row + (values[everyone] - values[frozenset()] - row.sum()) / players)
    paired: Tensor = torch.stack(rows).unflatten(0, (-1, 2)).mean(dim=1)
    return paired


def _all_coalitions(players: int, values: Mapping[Coalition, float]) -> Tensor:
    row = torch.zeros(players, dtype=torch.float64, device="cpu")
    for coalition in list_coalitions(players, []):
        for player in set(range(players)) - coalition:
            weight = 1 / (players * math.comb(players - 1, len(coalition)))
            row[player] += weight * (values[coalition | {player}] - values[coalition])
    return row[None]


def _row(numbers: Iterable[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64, device="cpu")


def mean_intervals(rows: Tensor, confidence: float) -> list[tuple[float, float]]:
    """Return Student's interval of each column's mean, ``[K, n]``; a point for one row."""
    means = rows.mean(dim=0)
    width = torch.zeros_like(means)
    if len(rows) > 1:
        error = rows.std(dim=0, correction=1) / math.sqrt(len(rows))
        width = student_quantile(confidence, len(rows) - 1) * error
    return list(zip((means - width).tolist(), (means + width).tolist(), strict=True))
