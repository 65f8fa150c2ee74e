"""main.py from the outside: what a newcomer types, and what is printed."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import main
from shuffle_batchnorm.moco.cli import EXTRA

ROOT = Path(__file__).resolve().parents[1]
MAIN = str(ROOT / "main.py")
PYTHON = (sys.executable, MAIN)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
QUICK = ("--shuffle", "--epochs", "1", "--data", "random")
MEAN = re.compile(r"\[([\d.]+)\]mean (before|after) shuffle: tensor\(\[(.*)\]\)")

Means = dict[str, tuple[float, ...]]


def start(command: Sequence[str], first_path: Path = ROOT / "src") -> subprocess.Popen[str]:
    """Start a command on the CPU, in a process group of its own, as a terminal does."""
    # Two cores have to do for every worker, and a torchrun around pytest is not ours.
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    paths = [str(first_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(paths)
    ours |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=ours, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """The status, stdout and stderr of each; none outlives the test."""
    try:
        ends = [process.communicate(timeout=120) for process in processes]
        return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # not killed: a torchrun first has to end its workers
                process.communicate()


def run(*command: str, first_path: Path = ROOT / "src") -> str:
    """The stdout of a command that has to succeed, without a warning."""
    [(status, stdout, stderr)] = finish([start(command, first_path)])
    assert status == 0, stderr
    assert not re.search(r"\wWarning: ", stderr), stderr  # Python's; gloo may speak of hostnames
    return stdout


def means(stdout: str) -> tuple[Means, Means]:
    """The printed means before and after the shuffle: name of the rank (or group) to channels."""
    found: dict[str, Means] = {"before": {}, "after": {}}
    for name, when, numbers in MEAN.findall(stdout):
        assert name not in found[when], f"[{name}] {when} is printed twice"
        found[when][name] = tuple(float(number) for number in numbers.split(","))
        assert len(found[when][name]) == 4
    assert len(set(found["before"].values())) == len(found["before"]), "two groups saw the same"
    return found["before"], found["after"]


def after_the_greeting(stdout: str) -> list[str]:
    """What is printed below the lines that say how the workers were started."""
    return stdout.split("with gloo\n", 1)[1].splitlines()


@pytest.fixture(scope="module")
def seeds_run() -> str:
    """The command of the seed's page."""
    return run(*PYTHON, "--gpu", "0,1", "--shuffle", "--epochs", "10")


BLOCKER = f"import sys; sys.modules |= dict.fromkeys({sorted(EXTRA - {'numpy'})})\n"


@pytest.fixture(scope="module")
def spawned_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short run that this file spawned itself, for torchrun's to be compared with.

    Where the packages of the extra `train` can't be imported, for to start ranks needs none of
    them; NumPy stays, with which torch sends objects.
    """
    folder = tmp_path_factory.mktemp("without_extra")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return run(*PYTHON, "--gpu", "0,1", *QUICK, first_path=folder)


def test_seeds_command_swaps_between_two_processes(seeds_run: str) -> None:
    """Catches a check that prints its own statistics twice, and shards that are not disjoint."""
    before, after = means(seeds_run)
    assert after == {"0": before["1"], "1": before["0"]}
    assert after != before


def test_seeds_command_prints_the_seeds_lines_in_order(seeds_run: str) -> None:
    """Catches lines that are missing, added, cut in two, or in another order than the seed's."""
    blank = re.sub(r"tensor\(.*\)|0\.\d{4}|\d+ held", "*", seeds_run)
    check = [f"[{r}]mean {when} shuffle: *" for when in ("before", "after") for r in (0, 1)]
    epochs = [[f"[{epoch}/10] Loss *", "=" * 48] * 2 for epoch in range(10)]
    assert blank.splitlines() == [
        "=> Spawning 2 distributed workers",
        "=> GPU 0,1 not found: the workers run on the CPU, with gloo",
        *(line for lines in epochs[:9] for line in lines),
        *check,
        *epochs[9],
        "=> Accuracy * on *-out images",
    ]


def test_digits_are_learnt(seeds_run: str) -> None:
    """Catches an optimizer without the model's parameters, and running statistics gone wrong."""
    losses = [float(loss) for loss in re.findall(r"Loss (\S+)", seeds_run)]
    assert 0.3 < losses[0] < 0.8
    assert max(losses[-2:]) < 0.2
    accuracy = re.search(r"Accuracy (\S+)", seeds_run)
    assert accuracy
    assert float(accuracy[1]) > 0.94


def in_this_process(
    flags: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The stdout of a run with one worker, which is this process."""
    monkeypatch.setattr(sys, "argv", ["main.py", "--gpu", "0", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main.main()
    return capsys.readouterr().out


def test_without_shuffle_nothing_is_swapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a model that is converted, or a check that is printed, without being asked for."""
    stdout = in_this_process(["--epochs", "1", "--data", "random"], monkeypatch, capsys)
    assert "shuffle" not in stdout
    assert stdout.count("[0/1] Loss 0.") == 1
    assert "noise has nothing to learn" in stdout


def test_groups_swap_inside_one_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches virtual groups that are not printed, or rows of the wrong group."""
    stdout = in_this_process([*QUICK, "--groups", "2"], monkeypatch, capsys)
    before, after = means(stdout)
    assert stdout.startswith("=> Spawning 1 distributed worker\n=> GPU 0 not found")
    assert after == {"0.0": before["0.1"], "0.1": before["0.0"]}


def test_three_workers_rotate() -> None:
    """Catches a rotation in the wrong direction, which a swap of two hides."""
    before, after = means(run(*PYTHON, "--gpu", "0,1,2", *QUICK))
    assert after == {"0": before["1"], "1": before["2"], "2": before["0"]}


def test_torchrun_prints_the_same(spawned_run: str) -> None:
    """Catches workers that spawn workers of their own, or take another one's rank."""
    stdout = run(*TORCHRUN, "--standalone", "--nproc-per-node", "2", MAIN, *QUICK)
    assert "=> Joining 2 distributed workers\n" in stdout
    assert after_the_greeting(stdout) == after_the_greeting(spawned_run)
    before, after = means(stdout)
    assert after == {"0": before["1"], "1": before["0"]}


def test_torchrun_on_two_nodes_prints_the_same(spawned_run: str) -> None:
    """Catches the seed's limit: rank taken for local rank, so that nodes never meet."""
    for last_try in (False, True):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        where = ("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port)
        nodes = [
            start((*TORCHRUN, "--nnodes", "2", "--node-rank", node, *where, MAIN, *QUICK))
            for node in ("0", "1")
        ]
        (status_0, stdout_0, stderr_0), (status_1, stdout_1, stderr_1) = finish(nodes)
        # Somebody else may have taken the port between our probe and torchrun.
        if last_try or "address already in use" not in (stderr_0 + stderr_1).lower():
            break
    assert (status_0, status_1) == (0, 0), stderr_0 + stderr_1
    assert after_the_greeting(stdout_0) == after_the_greeting(spawned_run)
    assert stdout_1 == ""


def test_failing_worker_fails_the_command(tmp_path: Path) -> None:
    """Catches a worker's error that is swallowed, and peers that are left waiting for it."""
    text = Path(MAIN).read_text()
    line = "    model = make_model()\n"
    assert line in text
    broken = tmp_path / "main.py"
    raising = '    if rank.index == 1:\n        raise RuntimeError("rank 1 gives up\\nfor good")\n'
    broken.write_text(text.replace(line, line + raising))
    [(status, _, stderr)] = finish([start((sys.executable, str(broken), *QUICK))])
    assert status == 1
    assert stderr == "main.py: a worker failed: RuntimeError: rank 1 gives up for good\n"


def members(group: int) -> list[int]:
    """The processes of a process group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def assert_ended(group: int) -> None:
    """All processes of a group end within seconds."""
    until = time.monotonic() + 20
    while members(group) and time.monotonic() < until:
        time.sleep(0.05)
    assert members(group) == []


@contextlib.contextmanager
def training(until: str = "Loss") -> Iterator[subprocess.Popen[str]]:
    """main.py with two workers that have printed this word, and would train for long."""
    process = start((*PYTHON, "--gpu", "0,1", "--data", "random", "--epochs", "100000"))
    try:
        assert process.stdout is not None
        assert any(until in line for line in process.stdout)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_killed_parent_leaves_no_workers() -> None:
    """Catches workers that train on, or wait for ever, when nobody is there to end them."""
    with training() as process:
        assert len(members(process.pid)) >= 3
        process.kill()
        process.wait()
        assert_ended(process.pid)


@pytest.mark.parametrize(
    ("moment", "signum"),
    [("Loss", signal.SIGINT), ("gloo", signal.SIGINT), ("Loss", signal.SIGTERM)],
)
def test_ctrl_c_prints_no_traceback(moment: str, signum: signal.Signals) -> None:
    """Catches a KeyboardInterrupt in the parent or in a worker, and a signal that nobody hears.

    While the workers train, and while they still import torch.
    """
    with training(moment) as process:
        while len(members(process.pid)) < 4:  # two workers, and one that multiprocessing starts
            time.sleep(0.01)
        os.killpg(process.pid, signum)
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (128 + signum, "")
        assert_ended(process.pid)


def test_ctrl_c_prints_no_traceback_while_torch_is_imported() -> None:
    """Catches a KeyboardInterrupt outside of `main`."""
    process = start((*PYTHON, "--data", "random", "--epochs", "100000"))
    try:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout, stderr) == (-signal.SIGINT, "", "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu 0,x", "--gpu: '0,x' is not a list of different GPUs such as 0,1"),
        ("--gpu 0,,1", "--gpu: '0,,1' is not a list of different GPUs such as 0,1"),
        ("--gpu 1,1", "--gpu: '1,1' is not a list of different GPUs such as 0,1"),
        ("--shuffle --mode deal", "--mode: invalid choice: 'deal'"),
        ("--mode regroup", "--mode: needs --shuffle"),
        ("--groups 2", "--groups: needs --shuffle"),
        ("--shuffle --groups 0", "--groups: '0' is not a whole number of at least 1"),
        ("--shuffle --groups 5", "--batch-size: 32 is not divisible by --groups 5"),
        ("--batch-size 720", "--batch-size: 720 is more than each worker's 719 images"),
        ("--epochs ten", "--epochs: 'ten' is not a whole number of at least 1"),
        ("--lr nan", "--lr: nan is not a positive number"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_flags_end_in_one_line(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches flags that are refused only by a worker, with a traceback, or not at all."""
    monkeypatch.setattr(sys, "argv", ["main.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        main.main()
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 2
    assert stdout == ""
    assert stderr.startswith("main.py: error: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_bad_flags_reach_the_shell() -> None:
    """Catches a status, a line or a traceback that only the real process shows."""
    [(status, stdout, stderr)] = finish([start((*PYTHON, "--gpu", "zero"))])
    message = "argument --gpu: 'zero' is not a list of different GPUs such as 0,1"
    assert (status, stdout, stderr) == (2, "", f"main.py: error: {message}\n")


def test_missing_scikit_learn_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an ImportError shown to somebody who only lacks the extra."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "main.py: error: argument --data: digits needs scikit-learn: "
        'pip install ".[demo]" in the folder of this file, or use --data random\n'
    )
