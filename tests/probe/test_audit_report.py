"""What an audit says and draws."""

import pytest

from shuffle_batchnorm import AuditReport

FOUND = AuditReport(
    0.4321,
    {"layer1.bn": 1.2, "head": -0.2},
    {"layer1.bn": (1.1, 1.3), "head": (-0.2, -0.2)},
    {"layer1.bn": "BatchNorm2d", "head": "Centre"},
    64,
    8,
)


def test_the_report_reads_well() -> None:
    first, *lines = str(FOUND).splitlines()
    assert first == (
        "dependence 0.432: change of 8 probes' outputs when the other 56 samples are replaced, "
        "over the spread of outputs"
    )
    assert lines == [
        " 120.0 %  layer1.bn  BatchNorm2d  (110.0 to 130.0)",
        " -20.0 %  head       Centre",
    ]


def test_nothing_is_said_in_one_line() -> None:
    text = str(AuditReport(0.0, {}, {}, {}, 16, 2))
    assert text.startswith("dependence 0: ")
    assert text.endswith("; no module mixes samples")


def test_the_picture_has_a_bar_for_each_share() -> None:
    pytest.importorskip("matplotlib")
    axes = FOUND.plot().axes[0]
    assert [round(bar.get_width()) for bar in axes.patches] == [120, -20]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer1.bn", "head"]
    nothing = AuditReport(0.0, {}, {}, {}, 16, 2).plot().axes[0]
    assert list(nothing.patches) == []
