"""What a measurement of the leak has found, as numbers and text."""

from dataclasses import dataclass, field

from .verdict import judge


@dataclass(frozen=True)
class LeakReport:
    """What `measure_leak` found, the same on all ranks; accuracies are between 0 and 1.

    Attributes:
        as_trained: top-1 pretext accuracy of keys in the batch they are trained in.
        fresh: that of the same keys in fresh batches.
        leak: the first minus the second.
        standard_error: of the leak.
        interval: bootstrap interval of the leak.
        confidence: of the interval.
        keys: how many keys were measured.
        batches: in how many batches.
        by_layer: module name to its part of the leak, in the order of calls; the sum is `leak`.
            Negative where a module's batch statistics cost accuracy. Empty unless asked for, and
            if no key depends on its batch.
        layer_intervals: module name to the bootstrap interval of its part.
    """

    as_trained: float
    fresh: float
    leak: float
    standard_error: float
    interval: tuple[float, float]
    confidence: float
    keys: int
    batches: int
    by_layer: dict[str, float] = field(default_factory=dict)
    layer_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """What the interval says: "a leak: …", "no leak found; …" or "can't tell: …".

        The rules are those of ``docs/leak.md``.
        """
        return judge(
            self.interval,
            as_trained=self.as_trained,
            fresh=self.fresh,
            batches=self.batches,
            confidence=self.confidence,
        )

    @property
    def shares(self) -> dict[str, float]:
        """Module name to its share of the leak; the sum is 1.

        Empty where the interval of the leak does not lie above 0: a share of nothing says nothing.
        """
        if self.interval[0] <= 0:
            return {}
        return {name: part / self.leak for name, part in self.by_layer.items()}

    def __str__(self) -> str:
        """Return figures and verdict in a line, and one more for each module in `by_layer`."""
        low, high = self.interval
        first = (
            f"leak {self.leak:.3f} ± {self.standard_error:.3f} ({100 * self.confidence:g} % "
            f"interval {low:.3f} to {high:.3f}): top-1 {self.as_trained:.3f} as trained, "
            f"{self.fresh:.3f} in a fresh batch; {self.keys} keys in {self.batches} batches; "
            f"{self.verdict}"
        )
        width = max(map(len, self.by_layer), default=0)
        lines = [
            f"{part:8.3f}  {name:{width}}  ({low:.3f} to {high:.3f})"
            for (name, part), (low, high) in zip(
                self.by_layer.items(), self.layer_intervals.values(), strict=True
            )
        ]
        return "\n".join([first, *lines])
