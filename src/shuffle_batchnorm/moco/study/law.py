r"""The leak as a function of group size and blocks: what theory suggests, as families to fit.

n samples are normalised together, cut into B blocks of b = n / B. Of the n − 1 other samples that
normalise a query, the b − 1 of its own block also normalise its key. Their *share* is

.. math:: s(n, B) = \frac{1}{n (n - 1)} \sum_{\text{blocks}} b (b - 1)
    \qquad \left(= \frac{n / B - 1}{n - 1} \text{ if B divides n} \right),

1 for B = 1 and 0 for B = n. See docs/law.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]
# Group sizes are taken relative to this one, so that a factor is the value at it.
REFERENCE = 8


@dataclass(frozen=True)
class Family:
    """A function of n and B with a few parameters.

    Attributes:
        name: for tables.
        formula: as a reader writes it; m is n / 8.
        parameters: their names.
        start: where a fit begins.
        leak: ``leak(n, B, *parameters)``, element by element.
        is_late: added when some runs, also of held-out cells, had been seen.
    """

    name: str
    formula: str
    parameters: tuple[str, ...]
    start: tuple[float, ...]
    leak: Callable[..., Any]
    is_late: bool = False


def share(n: ArrayLike, blocks: ArrayLike) -> Array:
    """Return s(n, B), the mean over samples; blocks are as equal as they can be.

    Example:
        >>> share([8, 8, 8], [1, 2, 8])
        array([1.        , 0.42857143, 0.        ])
    """
    n, blocks = np.asarray(n, float), np.asarray(blocks, float)
    small = np.floor(n / blocks)
    large = n - small * blocks  # so many blocks have one more
    pairs = (blocks - large) * small * (small - 1) + large * (small + 1) * small
    return np.asarray(pairs / (n * (n - 1)))


def _size(n: ArrayLike) -> Array:
    return np.asarray(n, float) / REFERENCE


def _probit(
    n: ArrayLike, blocks: ArrayLike, base: float, strength: float, beta: float, gamma: float
) -> Array:
    signal = strength * share(n, blocks) ** np.abs(beta) * _size(n) ** -gamma
    return np.asarray(ndtr(base + signal) - ndtr(base))


def _limited(n: ArrayLike, blocks: ArrayLike, base: float, strength: float, limit: float) -> Array:
    signal = strength * share(n, blocks) / (1 + np.asarray(n, float) / np.abs(limit))
    return np.asarray(ndtr(base + signal) - ndtr(base))


FAMILIES = (
    Family(
        "signal, linear in the share",
        "Φ(a + k·s·m^−γ) − Φ(a)",
        ("a", "k", "γ"),
        (-1.0, 1.5, 0.5),
        lambda n, blocks, a, k, gamma: _probit(n, blocks, a, k, 1.0, gamma),
    ),
    Family(
        "signal, power of the share",
        "Φ(a + k·s^β·m^−γ) − Φ(a)",
        ("a", "k", "β", "γ"),
        (-1.0, 1.5, 1.0, 0.5),
        _probit,
    ),
    Family(
        "power of the share",
        "λ·s^β·m^−γ",
        ("λ", "β", "γ"),
        (0.5, 1.5, 0.5),
        lambda n, blocks, top, beta, gamma: (
            top * share(n, blocks) ** np.abs(beta) * _size(n) ** -gamma
        ),
    ),
    Family(
        "power of the blocks",
        "λ·B^−β·m^−γ",
        ("λ", "β", "γ"),
        (0.5, 2.0, 0.5),
        lambda n, blocks, top, beta, gamma: (
            top * np.asarray(blocks, float) ** -beta * _size(n) ** -gamma
        ),
    ),
    Family(
        "exponential in the blocks",
        "λ·exp(−c·(B − 1))·m^−γ",
        ("λ", "c", "γ"),
        (0.5, 1.0, 0.5),
        lambda n, blocks, top, c, gamma: (
            top * np.exp(-c * (np.asarray(blocks, float) - 1)) * _size(n) ** -gamma
        ),
    ),
    Family(
        "signal, limited by its own noise",
        "Φ(a + k·s / (1 + n / ν)) − Φ(a)",
        ("a", "k", "ν"),
        (-1.5, 2.5, 30.0),
        _limited,
        is_late=True,
    ),
)
