"""Commands are configurations: the same fields and defaults, and what they do with them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from shuffle_batchnorm.moco.commands import Compare, Study, Train
from shuffle_batchnorm.moco.comparison import compare as module
from shuffle_batchnorm.moco.config import Config, ConfigError, from_dict, to_dict
from shuffle_batchnorm.moco.study import run as run_module
from shuffle_batchnorm.moco.study.cells import SEEDS, chosen


def test_train_has_the_defaults_of_a_configuration() -> None:
    """Catches a flag whose default is not that of the same run from Python."""
    assert from_dict(to_dict(Train())) == Config()
    assert {field.name for field in fields(Train)} == {field.name for field in fields(Config)}


def test_compare_hands_on_lists_and_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name with a blank, a seed that is text, and a command that can't be typed again."""
    called: list[Any] = []
    monkeypatch.setattr(module, "compare", lambda *args, **kwargs: called.extend([args, kwargs]))
    monkeypatch.setattr("sys.argv", ["x", "compare", "--output", "a folder"])
    Compare(bn="local, regroup,", seeds="0,12").act()
    (config, bns, seeds, output), named = called
    assert isinstance(config, Config)
    assert (bns, seeds, output) == (["local", "regroup"], [0, 12], Path("runs/compare"))
    assert named == {"command": "shuffle-batchnorm compare --output 'a folder'"}


def test_study_hands_on_seeds_and_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches defaults that are not those of the study from Python."""
    called: list[Any] = []
    monkeypatch.setattr(run_module, "study", lambda *args, **kwargs: called.extend([args, kwargs]))
    Study(cells="n8-*", records=Path("r.json")).act()
    (output, seeds, cells), named = called
    assert (output, tuple(seeds), cells) == (Path("runs/study"), SEEDS, chosen("n8-*"))
    assert named.pop("command").startswith("shuffle-batchnorm")
    assert named == {"earlier": Path("r.json"), "data_path": None, "report_only": False}


def test_seeds_are_whole_numbers() -> None:
    with pytest.raises(ConfigError, match=r"--seeds must be whole numbers, got 1\.5"):
        Compare(seeds="0,1.5").act()
