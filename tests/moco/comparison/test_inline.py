"""Figures in a page: their colours are the page's to change, their ids are their own."""

import re

from matplotlib.figure import Figure

from shuffle_batchnorm.moco.comparison.inline import pictures, svg
from shuffle_batchnorm.moco.comparison.style import INK, NARROW, PAGE


def figure(width: float = 3.0) -> Figure:
    drawn = Figure(figsize=(width, 2.0))
    axes = drawn.subplots()
    axes.plot([0, 1], [0, 1], color=INK, marker="o", markeredgecolor="white")
    axes.text(0, 0, '<b>--> & "words"')
    return drawn


def test_every_colour_is_a_variable_that_falls_back_to_itself() -> None:
    """Catches a colour that stays dark on a dark page."""
    text = svg(figure(), "a", "label")
    assert f"stroke: var(--c{INK[1:]}, {INK})" in text
    assert "stroke: var(--cffffff, #ffffff)" in text
    assert re.findall(r"(?<!, )#[0-9a-f]{6}\b(?!-)", text.replace("#a-", "")) == []


def test_ids_are_the_figures_own_and_are_found() -> None:
    text = svg(figure(), "a", "label")
    ids = re.findall(r' id="([^"]*)"', text)
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("a-") for name in ids)
    assert {one or other for one, other in used} <= set(ids)
    assert set(ids).isdisjoint(re.findall(r' id="([^"]*)"', svg(figure(), "b", "label")))


def test_it_is_an_element_and_no_file() -> None:
    """Catches a style sheet, or words, that would be the page's."""
    text = svg(figure(), "a", 'a "label" <x>')
    assert text.startswith('<svg viewBox="0 0 216 144" width="288" height="192" role="img" ')
    assert 'aria-label="a &#34;label&#34; &lt;x&gt;"' in text
    assert text.strip().endswith("</svg>")
    for word in ("<style", "<!--", "<?xml", "DOCTYPE", "xmlns", "metadata", "words"):
        assert word not in text
    assert text == svg(figure(), "a", 'a "label" <x>')  # the same each time


def test_each_is_there_for_a_page_and_for_a_phone() -> None:
    asked = []

    def draw(width: float) -> Figure:
        asked.append(width)
        return figure(width)

    found = pictures({"some": draw, "none": lambda _: None}, {"some": "label"})
    assert asked == [PAGE, NARROW]
    assert list(found) == ["some"]
    assert re.findall(r'<div class="(\w+)"><svg[^>]* width="(\d+)"', found["some"]) == [
        ("wide", "662"),
        ("narrow", "360"),
    ]
