"""The results in words and numbers: cells, notes, and tables for the terminal and for Markdown."""

from collections.abc import Mapping, Sequence

from .summary import (
    BASELINE,
    Estimate,
    Record,
    Summary,
    diverged,
    is_number,
    number,
    on_a_par,
    paired,
    summarise,
)

HEADER = (
    "bn", "leak", "95 % interval", "kNN", "linear probe", "pretext accuracy", "loss", "seconds",
)  # fmt: skip
RUN_HEADER = (
    "bn", "seed", "leak", "95 % interval", "as trained", "fresh", "kNN", "pretext accuracy", "loss",
    "seconds", "samples/s",
)  # fmt: skip
LINEAR = "linear probe"
NOTHING = "–"
DIVERGED = "diverged"
INTERVALS = (
    "The leak's interval is Student's t over the seeds where there are three or more; with fewer "
    "it joins those of the runs' own probes and says nothing of other seeds."
)
ON_A_PAR = (
    "kNN in bold: the highest mean, and those less than two standard errors of the difference "
    "below it."
)
IN_BATCH = (
    "The negatives of simclr are the other keys of a step, and fewer of them where the leak is "
    "measured; those of the others are the queue. So its leak, pretext accuracy and loss can't be "
    "compared with theirs."
)
LEFT_OUT = (
    "Diverged runs, whose loss or score is not finite, are left out of the means: their leak says "
    "nothing."
)


def written(value: float | None, digits: int = 3) -> str:
    """A number with so many digits and a minus sign, or a dash where there is none.

    Example:
        >>> written(-0.0123), written(None)
        ('−0.012', '–')
    """
    if value is None:
        return NOTHING
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def with_error(estimate: Estimate | None, digits: int = 3) -> str:
    """A mean ± its standard error, if it has one."""
    if estimate is None or estimate.error is None:
        return written(None if estimate is None else estimate.mean, digits)
    return f"{written(estimate.mean, digits)} ± {written(estimate.error, digits)}"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """An interval in brackets."""
    if low is None or high is None:
        return NOTHING
    return f"[{written(low, digits)}, {written(high, digits)}]"


def note_of_diverged(one: Summary, form: str = " ({})") -> str:
    """What is said of a `--bn` some of whose runs diverged."""
    return form.format(f"{one.diverged} of {one.runs} diverged") if one.diverged else ""


def row(one: Summary) -> tuple[str, ...]:
    """The cells of one `--bn`, in the order of HEADER."""
    name, leak = one.bn + note_of_diverged(one), one.leak
    scores = (one.knn, one.linear, one.pretext_accuracy, one.loss)
    if one.diverged == one.runs:
        return (name, DIVERGED, NOTHING, *[DIVERGED] * len(scores), NOTHING)
    return (
        name,
        with_error(leak),
        interval(leak.low, leak.high) if leak else NOTHING,
        *map(with_error, scores),
        with_error(one.seconds, 1),
    )


def table(summaries: Sequence[Summary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header and a row for each `--bn`; without the linear probe where nobody has one."""
    shown = [
        position
        for position, word in enumerate(HEADER)
        if word != LINEAR or any(one.linear for one in summaries)
    ]
    header, *rows = (
        tuple(cells[position] for position in shown) for cells in (HEADER, *map(row, summaries))
    )
    return header, rows


def run_row(record: Record) -> tuple[str, ...]:
    """The cells of one run, in the order of RUN_HEADER."""
    bad = diverged(record)

    def cell(key: str, digits: int = 3) -> str:
        value = number(record, key)
        return DIVERGED if bad and value is None and key in record else written(value, digits)

    return (
        str(record["bn"]),
        str(record["seed"]),
        DIVERGED if bad else cell("leak"),
        NOTHING if bad else own_interval(record),
        *(
            cell(key)
            for key in ("leak_as_trained", "leak_fresh", "knn", "pretext_accuracy", "loss")
        ),
        cell("seconds", 1),
        cell("samples_per_second", 0),
    )


def own_interval(record: Record) -> str:
    """The interval that a run's probe gave for its leak."""
    ends = record.get("leak_interval") or ()
    return interval(*ends) if len(ends) == 2 and all(map(is_number, ends)) else NOTHING


def run_line(record: Record) -> str:
    """What is printed when a run has ended."""
    seconds = f"{written(number(record, 'seconds'), 1)} s"
    if diverged(record):
        return f"{DIVERGED}, {seconds}"
    return (
        f"leak {written(number(record, 'leak'))} {own_interval(record)}, "
        f"kNN {written(number(record, 'knn'))}, "
        f"pretext accuracy {written(number(record, 'pretext_accuracy'))}, {seconds}"
    )


def count_of_seeds(summaries: Sequence[Summary]) -> str:
    """'5 seeds', '1 seed', '2 to 5 seeds': the runs that went well, of those that have any."""
    counts = {one.runs - one.diverged for one in summaries} - {0} or {0}
    low, high = min(counts), max(counts)
    words = f"{low}" if low == high else f"{low} to {high}"
    return f"{words} seed{'' if high == 1 else 's'}"


def notes(records: Sequence[Record], *, pairs: bool = True) -> list[str]:
    """What the table's numbers are: sentences to stand below it; with what is paired by seed."""
    summaries = summarise(records)
    seeds = count_of_seeds(summaries)
    said = [f"Mean over {seeds} ± standard error." if seeds != "1 seed" else "One seed each."]
    said.append(INTERVALS)
    if "simclr" in {one.bn for one in summaries} and len(summaries) > 1:
        said.append(IN_BATCH)
    if on_a_par(summaries):
        said.append(ON_A_PAR)
    for key, name in (("knn", "kNN"), ("linear", LINEAR)):
        said += note_of_pairs(name, paired(records, key)) if pairs else []
    if any(one.diverged for one in summaries):
        said.append(LEFT_OUT)
    return said


def note_of_pairs(name: str, differences: Mapping[str, Estimate]) -> list[str]:
    """A sentence with the differences of a score to the baseline's, if there are any."""
    if not differences:
        return []
    words = [
        f"{bn} {'' if one.mean < 0 else '+'}{with_error(one, 4)} {interval(one.low, one.high, 4)}"
        for bn, one in differences.items()
    ]
    return [f"{name} minus that of {BASELINE}, paired by seed: {'; '.join(words)}."]


def markdown_table(records: Sequence[Record]) -> str:
    """The table in Markdown, aligned for a terminal too: one row per `--bn`, then the notes.

    Args:
        records: runs, as in `results.json`.

    Example:
        >>> runs = [dict(bn="local", seed=k, leak=0.3, knn=0.97) for k in range(3)]
        >>> print(markdown_table(runs).splitlines()[2][:60])
        | `local` | 0.300 ± 0.000 | [0.300, 0.300] | 0.970 ± 0.000 |
    """
    summaries = summarise(records)
    level = on_a_par(summaries)
    header, cells = table(summaries)
    rows = [header]
    for one, (words, leak, interval, knn, *others) in zip(summaries, cells, strict=True):
        bn = one.bn.replace("|", "\\|").replace("`", "'")
        score = f"**{knn}**" if one.bn in level else knn
        rows.append((f"`{bn}`{words[len(one.bn) :]}", leak, interval, score, *others))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [f"| {' | '.join(map(str.rjust, cells, widths))} |" for cells in rows]
    return "\n".join([*lines, "", " ".join(notes(records)), ""])
