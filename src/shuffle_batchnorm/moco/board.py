"""TensorBoard's files of a run: scalars, and the run's row in the tab HPARAMS."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import FREE
from .config import Config, flat

FOLDER = "tensorboard"
# The scalars whose last values are the columns of the tab, and what they are in a record.
RESULTS = {
    "test/knn": "knn",
    "test/linear": "linear",
    "test/leak": "leak",
    "train/pretext_accuracy": "pretext_accuracy",
    "train/loss": "loss",
}


def open_board(config: Config, world_size: int, step: int) -> "Board | None":
    """Return the board of a run that has done `step` steps; None where TensorBoard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return None
    return Board(config, world_size, step)


class Board:
    """TensorBoard's files of one run.

    Args:
        config: of the run, with its folder.
        world_size: W.
        step: how many steps are done; what was written of later ones is hidden.
    """

    def __init__(self, config: Config, world_size: int, step: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._writer = _writer(config.run.output / FOLDER, step)
        # Paths, and what changes nothing of the result, are no hyper-parameters.
        values = {name: value for name, value in flat(config).items() if name not in FREE}
        values = {name: "none" if v is None else v for name, v in values.items()}
        names = [name for name in RESULTS if name != "test/linear" or config.run.linear]
        # Not `add_hparams`: it makes a folder of its own, which is shown as another run.
        *begin, self._end = hparams({**values, "world_size": world_size}, dict.fromkeys(names, 0.0))
        for summary in begin:
            self._writer.file_writer.add_summary(summary)

    def add(self, name: str, value: float, step: int) -> None:
        """Write a scalar."""
        self._writer.add_scalar(name, value, step)

    def end(self, record: Mapping[str, Any], step: int) -> None:
        """Write what the trained model was measured to have, and that the run has ended."""
        for name in ("test/linear", "test/leak"):
            value = record.get(RESULTS[name])
            if value is not None:
                self.add(name, value, step)
        if record["leak_interval"] is not None:
            for name, value in zip(("low", "high"), record["leak_interval"], strict=True):
                self.add(f"test/leak_{name}", value, step)
        self._writer.file_writer.add_summary(self._end)

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def _writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
