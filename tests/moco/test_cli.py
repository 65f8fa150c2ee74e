"""The command line: what reads well, and what is refused in one line with exit code 2."""

import builtins
import functools
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import tyro
from PIL import Image

import shuffle_batchnorm
from moco.moco_runs import small_config, train_quickly
from ranks import run_on_ranks
from shuffle_batchnorm.moco import commands, measure_checkpoint, trainer
from shuffle_batchnorm.moco.checkpoint import PARTS
from shuffle_batchnorm.moco.cli import main
from shuffle_batchnorm.moco.comparison import compare
from shuffle_batchnorm.moco.config import Config, flag, flat
from shuffle_batchnorm.moco.measure import Measurements
from shuffle_batchnorm.moco.ranks.spawn import RankError, Stopped


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_on_ranks(2, train_quickly, small_config(folder, epochs=1))
    return folder / "last.pt"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line on stderr of a command that is refused: why."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *begun, line = err.splitlines()
    assert set(begun) <= {"train: reading digits", "train: reading cifar10"}
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "shuffle-batchnorm: missing subcommand: Expected one of {train, compare,"),
        ("trian", "shuffle-batchnorm: unrecognized options: trian"),
        ("train --bn none", "shuffle-batchnorm: invalid choice 'none' for argument '--bn'."),
        ("train --epochs x", "shuffle-batchnorm: value error: Error parsing --epochs: invalid"),
        ("train --epohcs 3", "shuffle-batchnorm: unrecognized options: --epohcs"),
        ("train --bn", "shuffle-batchnorm: missing argument: Missing value for argument '--bn'"),
        (
            "train --batch-size 250 --ranks 2 --groups 16",
            "train: --batch-size 250 is not divisible by 2 ranks x 16 groups = 32",
        ),
        ("train --queue 100", "train: --queue 100 is smaller than --batch-size 256"),
        ("train --epochs -1", "train: --epochs must be at least 1, got -1"),
        ("train --dataset cifar10", "train: --dataset cifar10 needs --data-path"),
        ("train --dataset cifar10 --data-path /no/such", "train: --data-path /no/such does not"),
        ("train --network alexnet", "train: --network alexnet is unknown; choose one of small"),
        ("compare --bn local,none", "compare: --bn must be of local, sync, swap, regroup, batch"),
        ("compare --seeds 0,one", "compare: --seeds must be whole numbers, got one"),
        ("compare --seeds 0,0", "compare: --seeds names 0 twice"),
        ("compare --bn regroup --groups 1", "train: --bn regroup needs 2 groups or more"),
        ("evaluate /no/such.pt", "checkpoint: /no/such.pt does not exist"),
        ("probe /no/such.pt --keys 0", "probe: --keys must be at least 1, got 0"),
    ],
)
def test_refused_in_one_line(
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*arguments.split(), *(["--device", "cpu"] if "train" in arguments else [])]
    assert refusal(capsys, *words).startswith(message)


@pytest.mark.parametrize("frame", [True, False])
def test_flag_parser_with_and_without_a_frame(
    frame: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tyro draws with what the terminal's encoding has."""
    monkeypatch.setattr(tyro._fmtlib, "_FORCE_UTF8_BOXES", frame)
    expected = "shuffle-batchnorm: missing argument: Missing value for argument '--bn'. Expected 1"
    assert refusal(capsys, "train", "--bn") == f"{expected} values; see --help"


def test_refused_by_a_spawned_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error crosses from one process to another, and they add nothing of their own."""
    words = ["--dataset", "cifar10", "--data-path", str(tmp_path), "--ranks", "2"]
    assert main(["train", *words, "--device", "cpu", "--output", str(tmp_path / "run")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(
        "train: starting 2 ranks on cpu\ntrain: reading cifar10\ntrain: --data-path "
    )
    assert len(err.splitlines()) == 3


def test_one_rank_of_torchrun_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(["train", "--queue", "1"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "--queue 1 is smaller" in refusal(capsys, "train", "--queue", "1")


def test_refused_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ranks 3 does not divide the 32 groups" in refusal(
        capsys, "probe", str(checkpoint), "--ranks", "3"
    )
    broken = checkpoint.with_name("broken.pt")
    broken.write_bytes(checkpoint.read_bytes()[:-100])
    assert "broken.pt is damaged" in refusal(capsys, "evaluate", str(broken))
    torch.save(dict.fromkeys(PARTS, 1) | {"format": 0}, broken)
    assert "has format 0" in refusal(capsys, "evaluate", str(broken))


def test_help_shows_every_flag_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name in flat(Config()):
        assert re.search(rf"^│? *{flag(name)}[ ,]", out, re.MULTILINE), name


def test_help_of_compare_hides_what_it_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--bn BN,BN,..." in out
    assert "--seeds INT,INT,..." in out
    assert "--seed " not in out
    assert "--resume" not in out


def test_train_gets_what_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []

    def train(config: Config) -> dict[str, Any]:
        seen.append(config)
        return {"knn": None, "leak": None}

    monkeypatch.setattr(trainer, "train", train)
    assert main(["train", "--bn", "swap", "--no-mlp", "--data-path", "a b", "--ranks", "2"]) == 0
    [config] = seen
    assert type(config) is Config
    assert config == small_config_from_defaults(
        bn="swap", mlp=False, data_path=Path("a b"), ranks=2
    )


def small_config_from_defaults(**changes: Any) -> Config:
    everything = flat(Config()) | changes
    return small_config(everything.pop("output"), **everything)


def test_compare_gets_what_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compare, "compare", lambda *args, command: seen.append((*args, command)))
    monkeypatch.setattr(sys, "argv", ["/bin/shuffle-batchnorm", "compare", "--bn", "a b"])
    words = ["compare", "--bn", "local, regroup", "--seeds", "3,1", "--groups", "16"]
    assert main([*words, "--output", "here"]) == 0
    [(config, bns, seeds, output, command)] = seen
    assert (bns, seeds, output) == (["local", "regroup"], [3, 1], Path("here"))
    assert type(config) is Config
    assert config.norm.groups == 16
    assert command == "shuffle-batchnorm compare --bn 'a b'"


def test_evaluate_and_probe(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one rank with all groups, what was trained on two: the record's figures come out."""
    record = json.loads(checkpoint.with_name("record.json").read_text())
    path = checkpoint.with_name("figures.json")
    words = [str(checkpoint), "--ranks", "1", "--device", "cpu", "--json", str(path)]
    assert main(["evaluate", *words]) == 0
    figures = json.loads(path.read_text())
    assert figures["knn"] == pytest.approx(record["knn"], abs=0.003)
    assert figures["linear"] > 0.8
    assert main(["probe", *words, "--batches", "8", "--keys", "4"]) == 0
    figures = json.loads(path.read_text())
    assert figures["leak_as_trained"] == pytest.approx(record["leak_as_trained"], abs=0.13)
    assert figures["leak"] == pytest.approx(
        figures["leak_as_trained"] - figures["leak_fresh"], abs=1e-12
    )
    assert figures["stability"]["layers"] == record["stability"]["layers"]
    evaluated, probed = capsys.readouterr().out.splitlines()
    assert evaluated.startswith(f"evaluate: {checkpoint}, epoch 1: kNN 0.")
    assert probed.startswith(f"probe: {checkpoint}, epoch 1: leak ")


def test_audit_and_the_leak_by_layer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.with_name("figures.json")
    words = [str(checkpoint), "--ranks", "1", "--device", "cpu", "--json", str(path)]
    assert main(["audit", *words]) == 0
    figures = json.loads(path.read_text())
    assert sum(figures["shares"].values()) == pytest.approx(1)
    assert main(["probe", *words, "--batches", "8", "--keys", "4", "--by-layer"]) == 0
    figures = json.loads(path.read_text())
    assert sum(figures["by_layer"].values()) == pytest.approx(figures["leak"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"audit: {checkpoint}, epoch 1: key encoder: dependence ")
    assert len(lines) == 2 + 2 * len(figures["by_layer"])


def test_all_groups_stay_on_other_ranks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(
        measure_checkpoint,
        "launch",
        lambda _at, _call, _what, config, *_, **__: seen.append(config),
    )
    for ranks in (None, 1, 4):
        measure_checkpoint.evaluate_checkpoint(checkpoint, ranks)
    assert [(c.run.ranks, c.norm.groups) for c in seen] == [(2, 16), (1, 32), (4, 8)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Stopped(signal.SIGTERM, "train: stopped by SIGTERM"), 143, "train: stopped by SIGTERM"),
        (Stopped(signal.SIGINT, "train: stopped by SIGINT"), 130, "train: stopped by SIGINT"),
        (KeyboardInterrupt(), 130, "stopped"),
        (RankError("the process of rank 1 died"), 1, "the process of rank 1 died"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def act(_: object) -> None:
        raise error

    monkeypatch.setattr(commands.Train, "act", act)
    assert main(["train"]) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.fixture
def without_tyro(monkeypatch: pytest.MonkeyPatch) -> None:
    really_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return really_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


NEED = (
    'shuffle-batchnorm: this needs tyro, one of the packages of the extra "train"; in the folder '
    'of the source code: pip install ".[train]"'
)


@pytest.mark.parametrize("arguments", ["train", "", "evaluate x.pt", "train --version"])
@pytest.mark.usefixtures("without_tyro")
def test_missing_extra(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the name of a package index that does not have this library."""
    assert refusal(capsys, *arguments.split()) == NEED


@pytest.mark.parametrize("arguments", ["--help", "-h", "train --help"])
@pytest.mark.usefixtures("without_tyro")
def test_usage_without_the_extra(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: shuffle-batchnorm [--help] [--version] COMMAND")
    assert out.endswith(f"\n{NEED}\n")
    named = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert named == [
        get_args(command)[0].__name__.lower() for command in get_args(commands.Command)
    ]


@pytest.mark.usefixtures("without_tyro")
def test_version_without_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"shuffle-batchnorm {shuffle_batchnorm.__version__}\n", "")


def test_help_names_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--version" in capsys.readouterr().out


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(_: object) -> None:
        raise ModuleNotFoundError("No module named 'another'", name="another")

    monkeypatch.setattr(commands.Train, "act", act)
    with pytest.raises(ModuleNotFoundError, match="another"):
        main(["train"])


def test_one_class_from_beginning_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches its kNN accuracy of 1, and scikit-learn's traceback; a long queue is said too."""
    few = functools.partialmethod(Measurements.leak, batches=8, keys=1)
    monkeypatch.setattr(Measurements, "leak", few)
    for part in ("train", "val"):
        (tmp_path / part / "cats").mkdir(parents=True)
        for number in range(24):
            Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / part / "cats" / f"{number}.png")
    left_out = f"warning: {tmp_path} has one class, cats: kNN and the linear probe are left out\n"
    words = ["--dataset", "imagefolder", "--data-path", str(tmp_path), "--image-size", "8"]
    words += ["--groups", "2", "--batch-size", "8", "--queue", "48", "--epochs", "1"]
    words += ["--augment", "none", "--device", "cpu"]
    words += ["--no-tensorboard", "--output", str(tmp_path / "run")]
    queue = "among a query's negatives are about 2 older keys of its own image"
    assert main(["train", *words]) == 0
    out, err = capsys.readouterr()
    warned = f"train: {left_out}train: warning: --queue 48 is longer than the 24 images: {queue}\n"
    assert err.startswith(f"train: reading imagefolder\n{warned}train: small network, --bn regroup")
    assert out.startswith("train: kNN left out, leak ")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["knn"] is None
    assert main(["train", *words, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert err.endswith(" had ended before\n")
    assert out.startswith("train: kNN left out, leak ")
    figures = tmp_path / "figures.json"
    last = str(tmp_path / "run" / "last.pt")
    assert main(["evaluate", last, "--json", str(figures)]) == 0
    out, err = capsys.readouterr()
    assert out == f"evaluate: {last}, epoch 1: kNN left out, linear probe left out\n"
    assert f"evaluate: {left_out}" in err
    assert [json.loads(figures.read_text())[name] for name in ("knn", "linear")] == [None, None]
    words[-1] = str(tmp_path / "compare")
    assert main(["compare", *words, "--bn", "local"]) == 0
    out, err = capsys.readouterr()
    assert f"train: {left_out}" in err
    assert ", kNN –, " in err
    assert "train:" not in out
