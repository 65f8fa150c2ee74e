"""TensorBoard's files, read back as TensorBoard reads them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from moco.moco_runs import small_config
from shuffle_batchnorm.moco.board import RESULTS, Board, open_board
from shuffle_batchnorm.moco.config import Config

RECORD = {"linear": None, "leak": 0.25, "leak_interval": [0.125, 0.5]}


def read(folder: Path) -> Any:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board


def scalars(board: Any) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(event.step, event.value) for event in board.Scalars(name)]
        for name in board.Tags()["scalars"]
    }


def hyperparameters(board: Any) -> dict[str, Any]:
    """What the tab HPARAMS knows: experiment, beginning of the session, its end."""
    metadata = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    plugin_data = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    found = {}
    for tag, content in board.summary_metadata.items():
        if content.plugin_data.plugin_name == metadata.PLUGIN_NAME:
            data = plugin_data.HParamsPluginData.FromString(content.plugin_data.content)
            found[tag.rpartition("/")[2]] = data
    return found


def opened(config: Config, step: int = 0) -> Board:
    pytest.importorskip("tensorboard")
    board = open_board(config, 2, step)
    assert board is not None
    return board


def test_a_run_from_beginning_to_end(tmp_path: Path) -> None:
    """Catches a second folder, which TensorBoard shows as a run of its own."""
    board = opened(small_config(tmp_path, bn="swap", tensorboard=True))
    board.add("train/loss", 1.5, 5)
    board.add("test/knn", 0.5, 20)
    board.end(RECORD, 22)
    board.close()
    assert len(list(tmp_path.rglob("events*"))) == 1
    found = read(tmp_path)
    assert scalars(found) == {
        "train/loss": [(5, 1.5)],
        "test/knn": [(20, 0.5)],
        "test/leak": [(22, 0.25)],
        "test/leak_low": [(22, 0.125)],
        "test/leak_high": [(22, 0.5)],
    }
    said = hyperparameters(found)
    assert set(said) == {"experiment", "session_start_info", "session_end_info"}
    values = said["session_start_info"].session_start_info.hparams
    assert values["bn"].string_value == "swap"
    assert values["queue"].number_value == 256
    assert values["world_size"].number_value == 2
    assert values["mlp"].number_value == 1
    assert values["layers"].string_value == "none"
    assert "output" not in values
    columns = [info.name.tag for info in said["experiment"].experiment.metric_infos]
    assert columns == [name for name in RESULTS if name != "test/linear"]


def test_a_linear_probe_has_a_column(tmp_path: Path) -> None:
    board = opened(small_config(tmp_path, linear=True))
    board.end({"linear": 0.75, "leak": None, "leak_interval": None}, 22)
    board.close()
    found = read(tmp_path)
    assert scalars(found) == {"test/linear": [(22, 0.75)]}
    columns = hyperparameters(found)["experiment"].experiment.metric_infos
    assert [info.name.tag for info in columns] == list(RESULTS)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """Catches rows of steps that the checkpoint doesn't have, and a run that is said to be over."""
    first = opened(small_config(tmp_path))
    for step in (5, 8, 10):
        first.add("train/loss", float(step), step)
    first.close()
    assert set(hyperparameters(read(tmp_path))) == {"experiment", "session_start_info"}
    second = opened(small_config(tmp_path), step=7)
    second.add("train/loss", 11.0, 11)
    second.close()
    assert scalars(read(tmp_path)) == {"train/loss": [(5, 5.0), (11, 11.0)]}


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_board(small_config(tmp_path), 1, 0) is None
