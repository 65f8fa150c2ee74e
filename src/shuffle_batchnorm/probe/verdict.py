"""What an interval of a leak says, in words."""

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context

ENOUGH = 8  # batches for an interval that covers at its rate; measured in docs/leak.md
SMALL = 0.05  # a leak that is told from none; docs/leak.md says why


def judge(
    interval: Sequence[float],
    *,
    as_trained: float,
    fresh: float,
    batches: int = ENOUGH,
    confidence: float = 0.95,
) -> str:
    """Return what the interval of a leak says.

    The first of these rules that fits:

    - ``[0, 0]``: *no leak*, no key depends on its batch;
    - fewer than 8 batches: *can't tell*, the interval misses too often;
    - it lies above 0: *a leak*, at least its lower end;
    - it ends above 0.05: *can't tell*, it is too wide;
    - the accuracy is below 0.05 as trained, or above 0.95 in fresh batches: *can't tell*, there is
      no room for a leak of 0.05;
    - else *no leak found*, and its upper end is what is excluded.

    The ends are rounded outwards, to two digits.

    Args:
        interval: its two ends.
        as_trained: accuracy in the batch.
        fresh: accuracy in fresh batches; the leak is the first minus this.
        batches: how many it was measured in.
        confidence: of the interval.

    Example:
        >>> judge((-0.004, 0.0234), as_trained=0.31, fresh=0.3)
        'no leak found; leaks above 0.024 are excluded at 95 %'
    """
    low, high = interval
    at = f"at {100 * confidence:g} %"
    if low == high == 0:
        return "no leak: no key depends on the other samples of its batch"
    if batches < ENOUGH:
        return f"can't tell: {batches} batches are too few; take {ENOUGH} or more"
    if low > 0:
        return f"a leak: at least {_rounded(low, ROUND_FLOOR)} {at}"
    if high > SMALL:
        between = f"{_rounded(low, ROUND_FLOOR)} and {_rounded(high, ROUND_CEILING)}"
        return f"can't tell: between {between} {at}; take more batches"
    if as_trained < SMALL:
        share = f"only {100 * as_trained:.1f} % of the keys"
        return f"can't tell: {share} are recognised at all; train longer"
    if fresh > 1 - SMALL:
        share = f"{100 * fresh:.1f} % of the keys"
        cure = "take the queue of the training, or more negatives"
        return f"can't tell: {share} are recognised in fresh batches as well; {cure}"
    return f"no leak found; leaks above {_rounded(max(0.0, high), ROUND_CEILING)} are excluded {at}"


def _rounded(value: float, rounding: str) -> str:
    context = Context(prec=2, rounding=rounding)
    return f"{context.create_decimal(repr(value)).normalize(context):f}"
