"""The results as others read them: CSV for a program, LaTeX and BibTeX for a paper."""

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from .provenance import commit, unique, version
from .summary import Record, on_a_par, summarise
from .tables import HEADER, NOTHING, notes, table

# What a paper's table leaves out.
UNPUBLISHED = frozenset({"loss", "seconds"})
# Key of a record: its unit, if it has one. Accuracies and leaks are fractions of 1.
COLUMNS = {
    "bn": "", "seed": "", "epochs": "", "world_size": "ranks", "groups": "per rank",
    "blocks": "per group", "offset": "groups", "layers": "", "train_images": "count",
    "test_images": "count", "parameters": "count", "leak": "fraction",
    "leak_standard_error": "fraction", "leak_low": "fraction", "leak_high": "fraction",
    "leak_as_trained": "fraction", "leak_fresh": "fraction", "knn": "fraction",
    "linear": "fraction", "pretext_accuracy": "fraction", "loss": "nat", "seconds": "s",
    "samples_per_second": "1/s", "diverged": "", "begun": "UTC", "commits": "",
}  # fmt: skip
_LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$",
})  # fmt: skip
TITLE = (
    "shuffle_batchnorm: batch normalisation with shuffled statistics, for contrastive learning in "
    "PyTorch"
)
AUTHOR = "shuffle_batchnorm contributors"
MOCO = """\
@inproceedings{he2020momentum,
  author        = {He, Kaiming and Fan, Haoqi and Wu, Yuxin and Xie, Saining and Girshick, Ross},
  title         = {Momentum Contrast for Unsupervised Visual Representation Learning},
  booktitle     = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern
                   Recognition (CVPR)},
  year          = {2020},
  doi           = {10.1109/CVPR42600.2020.00975},
  eprint        = {1911.05722},
  archiveprefix = {arXiv},
}
"""


def csv_table(records: Sequence[Record]) -> str:
    """One row per run, with all digits; the header names the unit, and what is unknown is empty.

    Example:
        >>> print(csv_table([dict(bn="local", seed=0, leak=0.25)])[:48])
        bn,seed,epochs,world_size [ranks],groups [per ra
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f"{key} [{unit}]" if unit else key for key, unit in COLUMNS.items()])
    for record in records:
        ends = dict(zip(("leak_low", "leak_high"), record.get("leak_interval") or (), strict=False))
        writer.writerow([csv_cell((record | ends).get(key)) for key in COLUMNS])
    return text.getvalue()


def csv_cell(value: Any) -> Any:
    """A value as a cell: a list as its entries, with a blank between them."""
    if not isinstance(value, list):
        return value
    return " ".join("unknown" if entry is None else str(entry) for entry in value)


def latex_table(records: Sequence[Record], dataset: str | None = None) -> str:
    r"""The table for a paper, with the booktabs package: mean ± standard error per `--bn`.

    Example:
        >>> runs = [dict(bn="local", seed=k, leak=0.3, knn=0.97) for k in range(3)]
        >>> print(latex_table(runs).splitlines()[9].strip()[:52])
        local & $0.300 \pm 0.000$ & $[0.300, 0.300]$ & $0.97
    """
    summaries = summarise(records)
    level = on_a_par(summaries)
    header, cells = table(summaries)
    shown = [position for position, word in enumerate(header) if word not in UNPUBLISHED]
    rows = [
        [
            latex_cell(row[position], bold=one.bn in level and header[position] == HEADER[3])
            for position in shown
        ]
        for one, row in zip(summaries, cells, strict=True)
    ]
    head = [latex_text(header[position]) for position in shown]
    lines = [f"    {' & '.join(row)} \\\\" for row in (head, *rows)]
    where = f" on {dataset}" if dataset else ""
    caption = latex_text(
        " ".join([f"The leak of MoCo's key encoder{where}.", *notes(records, pairs=False)])
    )
    return "\n".join([
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{caption}}}",
        r"  \label{tab:leak}",
        rf"  \begin{{tabular}}{{l{'r' * (len(shown) - 1)}}}",
        r"    \toprule",
        lines[0],
        r"    \midrule",
        *lines[1:],
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
        "",
    ])  # fmt: skip


def latex_cell(text: str, *, bold: bool = False) -> str:
    """A cell of the table: numbers in math mode, all else as text."""
    if text == NOTHING:
        return "--"
    if not re.fullmatch(r"[−\d., ±\[\]]+", text):
        return latex_text(text)
    number, plus_minus, error = text.replace("−", "-").partition(" ± ")
    number = rf"\mathbf{{{number}}}" if bold else number
    return f"${number} \\pm {error}$" if plus_minus else f"${number}$"


def latex_text(text: str) -> str:
    """Text with what LaTeX takes for commands escaped."""
    return text.translate(_LATEX)


def bibtex(records: Sequence[Record]) -> str:
    """Entries for this software, as far as the runs say which it was, and for MoCo.

    Example:
        >>> run = dict(versions=dict(shuffle_batchnorm=["0.1.0"]), commits=["67f698a"])
        >>> print(bibtex([run]).splitlines()[3])
          note   = {Version 0.1.0, commit 67f698a},
    """
    versions = unique([name for run in records for name in version(run, "shuffle_batchnorm")])
    commits = unique([name for run in records for name in run.get("commits", []) if name])
    years = {str(run["begun"])[:4] for run in records if run.get("begun")}
    note = ", ".join([*(f"version {name}" for name in versions), *map(commit, commits)])
    name, rest = latex_text(TITLE).replace("PyTorch", "{PyTorch}").split(": ")
    fields = {
        "author": f"{{{latex_text(AUTHOR)}}}",
        "title": f"{{{name}}}: {rest}",
        "note": note[:1].upper() + note[1:],
        "year": max(years, default=""),
    }
    lines = [f"  {key:6} = {{{value}}}," for key, value in fields.items() if value]
    return "\n".join(["@misc{shuffle_batchnorm,", *lines, "}", "", MOCO])
