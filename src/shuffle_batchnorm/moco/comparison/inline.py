"""Figures inside a page, as SVG: its colours are theirs, so they follow its dark mode and print.

Every colour becomes a variable of the page's style sheet, `--c22262b` for #22262b, which falls
back to the colour itself where the sheet has no other.
"""

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from .style import NARROW, PAGE, RC


def name_of(colour: str) -> str:
    """The variable that a colour is on a page."""
    return f"--c{colour.removeprefix('#')}"


def variable(colour: str) -> str:
    """A colour as the page's style sheet may change it.

    Example:
        >>> variable("#22262b")
        'var(--c22262b, #22262b)'
    """
    return f"var({name_of(colour)}, {colour})"


def pictures(
    drawings: Mapping[str, Callable[[float], Figure | None]], labels: Mapping[str, str]
) -> dict[str, Markup]:
    """Figures for a page, each twice: for its full width and for a phone; CSS shows one of them.

    Args:
        drawings: name, which no other element of the page has, to what draws it so many inches
            wide, or gives None if there is nothing to show.
        labels: name to what it shows, for those who can't see it.
    """
    found = {}
    with mpl.rc_context(RC):
        for name, draw in drawings.items():
            figures = {"wide": draw(PAGE), "narrow": draw(NARROW)}
            parts = [
                Markup('<div class="{}">{}</div>').format(
                    kind, svg(figure, f"{name}-{kind}", labels[name])
                )
                for kind, figure in figures.items()
                if figure is not None
            ]
            if parts:
                found[name] = Markup("\n").join(parts)
    return found


def svg(figure: Figure, prefix: str, label: str) -> Markup:
    """A figure as an element of a page; all ids in it begin with the prefix."""
    file = io.StringIO()
    nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Letters are paths, for a page can't count on a font. The salt: the same ids each time.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": prefix}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    # Without the head of a file, comments, and a style sheet that would be the page's too.
    inside = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</defs>", "", file.getvalue(), flags=re.DOTALL)
    inside = inside.partition("<svg")[2].partition(">")[2]
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)
    inside = re.sub(r' id="|href="#|url\(#', lambda found: f"{found[0]}{prefix}-", inside)
    inside = re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda found: variable(found[0]), inside)
    inside = inside.replace("xlink:href", "href")
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    head = Markup(
        '<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">'
    ).format(*(f"{72 * inches:g}" for inches in figure.get_size_inches()), width, height, label)
    return head + Markup(inside)  # nothing in it is the user's: words are paths
