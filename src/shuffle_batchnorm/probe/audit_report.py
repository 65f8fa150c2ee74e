"""What an audit has found, as numbers, text and picture."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AuditReport:
    """What `audit` found, the same on all ranks.

    Attributes:
        dependence: root mean square change of the probes' outputs when all other samples are
            replaced, over the root mean square spread of outputs across samples. Exactly 0 if no
            output depends on the others; about 1.4, or √2, if a probe's two outputs differ as
            those of two samples do; more if the batch moves all outputs together; inf if they
            depend on it and are the same for all samples.
        shares: module name to its share of `dependence`, in the order of calls; the sum is 1. A
            share is negative if the change is larger without the module. Empty if nothing mixes.
        intervals: module name to the 95 % interval of its share; a point where it is exact.
        kinds: module name to the name of its class.
        samples: how many there are, on all ranks.
        probes: how many of these are probes.
    """

    dependence: float
    shares: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    kinds: dict[str, str]
    samples: int
    probes: int

    def __str__(self) -> str:
        """Return the report: a line on the dependence, and one for each module that mixes."""
        others = self.samples - self.probes
        first = (
            f"dependence {self.dependence:.3g}: change of {self.probes} probes' outputs when the "
            f"other {others} samples are replaced, over the spread of outputs"
        )
        if not self.shares:
            return f"{first}; no module mixes samples"
        width = max(map(len, self.shares))
        lines = []
        for name, share in self.shares.items():
            low, high = self.intervals[name]
            between = f"  ({100 * low:.1f} to {100 * high:.1f})" if low < high else ""
            lines.append(f"{100 * share:6.1f} %  {name:{width}}  {self.kinds[name]}{between}")
        return "\n".join([first, *lines])

    def plot(self) -> Any:
        """Return a matplotlib Figure with a bar for each share, the first module called on top.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        names = list(self.shares)
        shares = [100 * self.shares[name] for name in names]
        figure = Figure(figsize=(6.4, 1.2 + 0.3 * max(len(names), 1)), layout="constrained")
        axes = figure.subplots()
        low, high = ([100 * self.intervals[name][end] for name in names] for end in (0, 1))
        errors = [
            [max(share - a, 0) for share, a in zip(shares, low, strict=True)],
            [max(b - share, 0) for share, b in zip(shares, high, strict=True)],
        ]
        axes.barh(names, shares, xerr=errors if any(map(any, errors)) else None, color="#4477aa")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("share of the dependence, %")
        axes.set_title(f"dependence {self.dependence:.3g}", loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        return figure
