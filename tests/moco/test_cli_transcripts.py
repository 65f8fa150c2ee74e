"""What the commands write where: in a terminal, in a log, through a pipe; on one rank, on two."""

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from moco.moco_runs import COMMAND, FLAGS, environment, kill_session, small_config, train_quickly
from shuffle_batchnorm.moco.cli import main
from shuffle_batchnorm.moco.commands import Evaluate
from shuffle_batchnorm.moco.measure import Measurements
from shuffle_batchnorm.probe import progress

SETTING = r"small network, --bn regroup, 1438 images of digits at 8 x 8; "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    train_quickly(small_config(folder, epochs=1))
    return str(folder / "last.pt")


@pytest.fixture
def few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partialmethod(Measurements.leak, batches=8, keys=4)
    monkeypatch.setattr(Measurements, "leak", few)


@contextmanager
def in_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A command whose stdout is a pipe, and what the terminal on its stderr gets of it."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        (*COMMAND, *arguments),
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    pieces: list[str] = []

    def read() -> None:
        try:
            while piece := os.read(master, 4096):
                pieces.append(piece.decode())
        except OSError:  # the last one that writes to it has gone
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process, pieces
    finally:
        kill_session(process.pid)
        process.communicate()
        reader.join()
        os.close(master)


def lines_of(pieces: list[str]) -> list[str]:
    """What a terminal shows in the end: what was written over is gone."""
    lines = "".join(pieces).replace("\r\n", "\n").split("\n")
    return [line.rpartition("\r\x1b[K")[2] for line in lines]


@pytest.mark.usefixtures("few_keys")
def test_train_into_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a line per step or epoch, and a figure that is printed twice."""
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    words = [*FLAGS.replace("--epochs 2", "--epochs 12").split(), "--ranks", "1", "--linear"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    head, rest = err.split("steps, to ", 1)
    assert head == (
        f"train: reading digits\ntrain: {SETTING}1 rank on cpu, with 16 groups of 8\n"
        "train: from the beginning of 132 "
    )
    tenths = re.findall(
        r"^train: +(\d+) %, step \d+ of 132, 0:.* left; loss .*$", rest, re.MULTILINE
    )
    assert tenths == ["11", "20", "30", "40", "50", "61", "70", "80", "90"]
    after = rest.splitlines()[10:]
    assert [line for line in after if " %, " not in line] == [
        "train: measuring the leak: 4 keys in each of 8 batches",
        "train: comparing activations with local batch norm",
        "train: linear probe: encoding images",
    ]
    assert len(after) < 30
    number = r"-?\d\.\d{4}"
    assert re.fullmatch(
        rf"train: kNN {number}, linear probe {number}, leak {number} \(95 % interval {number} to "
        rf"{number}\): top-1 {number} as trained, {number} in a fresh batch; .*\n",
        out,
    )
    assert len(re.findall("no leak|a leak|can't tell", out + err)) == 1


def test_two_ranks_in_a_terminal_and_a_signal(tmp_path: Path) -> None:
    """One rank speaks, in one line; Ctrl-C leaves nothing of it but why."""
    words = [*FLAGS.replace("--epochs 2", "--epochs 500").split(), "--ranks", "2"]
    with in_a_terminal(*words, "--output", str(tmp_path / "run")) as (process, pieces):
        until = time.monotonic() + 120
        while not re.search(r"%, 0:.* left; loss", "".join(pieces)):
            assert process.poll() is None, pieces
            assert time.monotonic() < until, pieces
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
        assert process.returncode == 130
    assert stdout == ""
    setting, start, stopped, end = lines_of(pieces)
    assert setting == f"train: {SETTING}2 ranks on cpu, each with 16 groups of 4"
    assert start == f"train: from the beginning of 5500 steps, to {tmp_path / 'run'}"
    assert re.match(r"train: stopped by SIGINT after step \d+ of 5500, which is saved", stopped)
    assert end == ""
    assert "train: starting 2 ranks on cpu" in "".join(pieces)


def test_two_ranks_probe_in_a_terminal(checkpoint: str) -> None:
    """Catches a bar that is left behind, or in what a script reads."""
    words = [
        "probe",
        checkpoint,
        "--ranks",
        "2",
        "--device",
        "cpu",
        "--batches",
        "8",
        "--keys",
        "4",
    ]
    with in_a_terminal(*words) as (process, pieces):
        stdout, _ = process.communicate(timeout=120)
        assert process.returncode == 0, pieces
    assert re.fullmatch(rf"probe: {checkpoint}, epoch 1: leak .*at most\n", stdout)
    assert lines_of(pieces) == [f"probe: {SETTING}2 ranks on cpu, each with 8 groups of 8", ""]
    assert "measure_leak: [" in "".join(pieces)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate", ["kNN: encoding images", "linear probe: encoding images"]),
        ("audit", ["auditing the key encoder"]),
        (
            "probe --batches 8 --keys 4",
            [
                "measuring the leak: 4 keys in each of 8 batches",
                "comparing activations with local batch norm",
            ],
        ),
    ],
)
def test_measurements_into_a_log(
    command: str, said: list[str], checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What begins is told on stderr, what comes of it once on stdout."""
    name, *words = command.split()
    assert main([name, checkpoint, "--device", "cpu", *words]) == 0
    out, err = capsys.readouterr()
    setting = f"{SETTING}1 rank on cpu, with 16 groups of 8"
    lines = [line for line in err.splitlines() if " %, " not in line]  # a slow machine counts
    assert lines == [f"{name}: {text}" for text in ("reading digits", setting, *said)]
    assert out.startswith(f"{name}: {checkpoint}, epoch 1: ")
    assert out.count("epoch 1") == 1


@pytest.mark.usefixtures("few_keys")
def test_a_comparison_that_had_ended_prints_the_same_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = FLAGS.replace("train", "compare").replace("--epochs 2", "--epochs 1").split()
    words = [*flags, "--ranks", "1", "--bn", "local", "--output", str(tmp_path)]
    assert main(words) == 0
    first, err = capsys.readouterr()
    assert err.startswith("compare: [1/1] local, seed 0\ntrain: reading digits\n")
    assert main(words) == 0
    again, err = capsys.readouterr()
    assert re.fullmatch(r"compare: \[1/1\] local, seed 0: leak .*\(had ended before\)\n", err)
    assert again == first
    table, _, rest = first.partition("\n\n")
    assert all(line.startswith("|") for line in table.splitlines())
    assert re.search(r"^local: (a leak|no leak|can't tell).*$", rest, re.MULTILINE)


def test_figures_are_written_though_nobody_reads_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a measurement that is lost with the pipe it was to be printed into."""
    monkeypatch.setattr(sys.stdout, "write", mock.Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        Evaluate(tmp_path / "last.pt", json=tmp_path / "figures.json").report({"epoch": 1}, "said")
    assert json.loads((tmp_path / "figures.json").read_text()) == {"epoch": 1}
