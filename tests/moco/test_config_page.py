"""docs/trainer.md shows the options that there are, with their defaults and what they do."""

from pathlib import Path

import pytest
import train_options as options

from shuffle_batchnorm.moco.config import Config, flag, flat


def test_the_page_is_that_of_the_configuration() -> None:
    """Catches an option, a default or a help text that the page doesn't have."""
    text = options.PAGE.read_text()
    _, begin, rest = text.partition(options.BEGIN)
    table, end, _ = rest.partition(options.END)
    assert (begin, end) == (options.BEGIN, options.END)
    assert table.strip() == options.tables().strip(), "run: python docs/options.py"


def test_every_flag_has_a_row_and_a_text() -> None:
    """Catches a script that passes over a kind of field."""
    rows = [line for line in options.tables().splitlines() if line.startswith("| `--")]
    assert [row.split("`")[1] for row in rows] == [flag(name) for name in flat(Config())]
    assert all(len(row.split(" | ")[2]) > 10 for row in rows)


def test_writing_it_again_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = options.PAGE.read_text()
    copy = tmp_path / "page.md"
    copy.write_text(text)
    monkeypatch.setattr(options, "PAGE", copy)
    options.main()
    assert copy.read_text() == text
