"""One style per kind of batch norm, and names that fit."""

from shuffle_batchnorm.moco.comparison.style import OTHERS, STYLES, style_of, wrapped


def test_kinds_can_be_told_apart_in_colour_and_in_grey() -> None:
    """Catches two kinds with one colour, or that only their colour tells apart."""
    everyone = [*STYLES.values(), *OTHERS]
    for look in ("colour", "marker"):
        assert len({getattr(style, look) for style in everyone}) == len(everyone)
    assert len({str(style.line) for style in STYLES.values()}) == len(STYLES)


def test_names_that_are_not_ours_have_styles_of_their_own() -> None:
    """Catches a second name of somebody's that looks like the first."""
    assert style_of("mine", ["local", "mine"]) != style_of("yours", ["mine", "yours"])
    assert style_of("mine", ["mine", "local"]) == style_of("mine", ["local", "mine", "yours"])
    assert style_of("swap", ["mine", "swap"]) == STYLES["swap"]


def test_a_long_name_is_cut_and_a_dollar_begins_no_formula() -> None:
    """Catches a name that covers its neighbours, or that matplotlib takes for mathematics."""
    assert wrapped("word " * 30, 10).count("\n") == 2
    assert wrapped("word " * 30, 10).endswith("…")
    assert wrapped("$x$") == r"\$x\$"
    assert wrapped("") == "?"
