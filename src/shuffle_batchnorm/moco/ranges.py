"""The values that a number among the flags may have."""

import math
from typing import NamedTuple


class Range(NamedTuple):
    """The values from `low`, which belongs to them or doesn't, to below `high`.

    Example:
        >>> 1 in Range(0, 1), 0 in Range(0, 1), str(Range(0, 1))
        (False, True, 'from 0 to below 1')
        >>> 0 in Range(0, with_low=False), str(Range(0, with_low=False)), str(Range(1))
        (False, 'above 0', 'at least 1')
    """

    low: float
    high: float = math.inf
    with_low: bool = True

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and (
            self.low <= value < self.high and (self.with_low or value > self.low)
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}" if self.with_low else f"above {self.low:g}"
        return f"from {self.low:g} to below {self.high:g}"
