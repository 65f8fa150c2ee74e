"""Every recipe in examples/ is run on two ranks, and does what its page says."""

import argparse
import importlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import byol
import common
import convert_part
import measure_your_checkpoint
import moco_v2
import simclr
from pages import blocks
from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CPU = torch.device("cpu")
FEW = "--batches", "8"
QUICK = {"arch": "small", "batch_size": 16, "data": None, "lr": 0.06, "steps": 4, "workers": 0}
MOCO = {"queue": 64, "temperature": 0.1, "momentum": 0.9, "save_every": 4, "resume": False}


def arguments(**options: Any) -> argparse.Namespace:
    return argparse.Namespace(**QUICK | options)


def run_main(name: str, *flags: str) -> str:
    """What a recipe prints on a rank of the pool, whose process group outlives it."""
    recipe = importlib.import_module(name)
    with (
        mock.patch.object(sys, "argv", [f"{name}.py", *flags]),
        mock.patch.object(dist, "destroy_process_group") as leave,
        redirect_stdout(io.StringIO()) as printed,
    ):
        recipe.main()
    leave.assert_called_once_with()
    return printed.getvalue()


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]


def state(model: nn.Module) -> Tensor:
    """All parameters, and the queue if there is one."""
    parts = [*model.parameters(), *(b for n, b in model.named_buffers() if n == "queue")]
    return torch.cat([part.detach().flatten() for part in parts])


def modes(model: nn.Module) -> set[str]:
    return {m.mode for m in model.modules() if isinstance(m, ShuffleBatchNorm)}


# MoCo


def _moco(path: Path) -> tuple[Tensor, set[str], set[str]]:
    options = MOCO | {"queue": 256, "checkpoint": path}
    with redirect_stdout(io.StringIO()):
        moco = moco_v2.train(arguments(**options, steps=2), CPU)
    everything = [part.double().flatten() for part in moco.state_dict().values()]
    return torch.cat(everything), modes(moco.encoder_q), modes(moco.encoder_k)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A checkpoint of moco_v2.py that was trained on two ranks, and what they printed."""
    path = tmp_path_factory.mktemp("moco") / "moco.pt"
    flags = "--steps", "40", "--batch-size", "32", "--checkpoint", str(path)
    return path, run_on_ranks(2, run_main, "moco_v2", *flags)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"queue": torch.ones(2, 2)}, "no parameter's name begins with encoder_q."),
        (
            {"encoder_q.w": torch.ones(1), "encoder_k.w": torch.ones(1), "queue": torch.ones(2, 2)},
            "not --arch small; your network goes here: Missing key",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    state: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    """Catches a page of missing keys, without a word on what to do."""
    torch.save({"state_dict": state}, tmp_path / "yours.pth.tar")
    with pytest.raises(SystemExit, match=re.escape(said)):
        measure_your_checkpoint.read(tmp_path / "yours.pth.tar", "small")


def test_moco_learns(trained: tuple[Path, list[str]]) -> None:
    """Catches an optimizer without the encoder, and two ranks that both print."""
    path, (printed, other) = trained
    assert other == ""
    found = losses(printed)
    assert len(found) == 4
    assert found[-1] < found[1] - 0.3  # at first the queue is random, and the loss rises
    assert torch.load(path)["step"] == 40


def test_moco_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    """Catches weights, running statistics or a queue that differ between ranks."""
    (first, q, k), (second, _, _) = run_on_ranks(2, _moco, tmp_path / "moco.pt")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (q, k) == ({"local"}, {"regroup"})


def test_the_queue_begins_again_at_its_end() -> None:
    """Catches keys that are lost where a batch does not fit into what is left."""
    moco = moco_v2.MoCo(nn.Identity(), nn.Identity(), 10)
    keys = torch.arange(12.0)[:, None].expand(-1, 128)
    for part in keys.split(4):
        moco.enqueue(part)
    assert moco.queue[:, 0].tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert moco.queue_ptr == 2


def test_moco_goes_on_as_if_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an optimizer, a queue, its pointer or a step that does not come back."""
    views = torch.randn(8, 2, 16, 3, 16, 16)
    stop = 8
    monkeypatch.setattr(common, "load", lambda _, first: views[first:stop])
    whole = arguments(**MOCO, steps=8, checkpoint=tmp_path / "whole.pt")
    expected = moco_v2.train(whole, CPU)
    part = arguments(**MOCO | {"resume": True}, steps=8, checkpoint=tmp_path / "part.pt")
    stop = 5  # killed after its fifth step; the checkpoint is of the fourth
    moco_v2.train(part, CPU)
    stop = 8
    found = moco_v2.train(part, CPU)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_batches_follow_from_the_step() -> None:
    """Catches a resumed run that takes other images than an uninterrupted one."""
    every = list(common.batches(20, 8, 0, 7))
    assert list(common.batches(20, 8, 3, 7)) == every[3:]
    assert every[0] + every[1] != every[2] + every[3]
    assert len(set(every[0] + every[1])) == 16


def test_fewer_images_than_a_batch_are_refused() -> None:
    """Catches a division by zero, deep in a loader."""
    with pytest.raises(SystemExit, match="20 images are fewer than a batch of all ranks, 21"):
        next(common.batches(20, 21, 0, 1))


def test_moco_fits_in_120_lines() -> None:
    assert len((EXAMPLES / "moco_v2.py").read_text().splitlines()) <= 120


# Somebody's builder.py


class Base(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, num_classes))


def _builder(path: Path) -> tuple[float, Tensor, Tensor, Tensor]:
    """The loss, the query encoder's gradient, and keys beside two batches of the other rank."""
    spec = importlib.util.spec_from_file_location("builder", path)
    assert spec
    assert spec.loader
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    model = DistributedDataParallel(builder.MoCo(Base))
    draw = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(3, 8, 6, generator=draw)
    logits, keys = model(images[0], images[1])
    loss = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    loss.backward()
    _, others = model(images[0], images[1 if dist.get_rank() == 0 else 2])
    return float(loss.detach()), model.module.encoder_q[0].weight.grad, keys, others


def test_builder_is_patched(tmp_path: Path) -> None:
    """Catches a patch that finds no line, and one after which keys are normalised as queries."""
    copied = tmp_path / "moco" / "builder.py"
    copied.parent.mkdir()
    copied.write_text((ROOT / "tests" / "moco_stand_in.py").read_text())
    patch = (EXAMPLES / "moco_builder.patch").read_text()
    done = subprocess.run(
        ["patch", "-p1"], input=patch, cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert "fuzz" not in done.stdout
    assert copied.read_text().count("self._batch") == 0
    (loss, gradient, keys, others), (_, same, _, _) = run_on_ranks(2, _builder, copied)
    assert loss > 0
    torch.testing.assert_close(gradient, same)
    # The key encoder has moved by the momentum update, of equal weights: nothing else is new.
    assert not torch.allclose(keys, others)


# SimCLR and BYOL


def _simclr_step(views: Tensor, groups: int) -> tuple[float, Tensor]:
    """The mean loss of all ranks, and the parameters after a step; views [2, W * N, *]."""
    rank, world = common.rank_of_world()
    torch.manual_seed(0)
    model = simclr.SimCLR(common.network("small").double(), groups)
    loss_of = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    view_1, view_2 = views.chunk(world, dim=1)[rank]
    loss = loss_of(view_1, view_2, 0.2)
    loss.backward()
    optimizer.step()
    total = loss.detach()
    if world > 1:
        dist.all_reduce(total)
    return float(total) / world, state(model)


def test_simclr_on_two_ranks_is_one_process() -> None:
    """Catches a gather without its gradient, and another rank's views taken for one's own."""
    views = torch.randn(2, 16, 3, 16, 16, dtype=torch.float64)
    loss, expected = _simclr_step(views, groups=4)
    (found, first), (_, second) = run_on_ranks(2, _simclr_step, views, groups=2)
    assert abs(found - loss) < 1e-9
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-9)


def test_simclr_learns_and_prints_its_leak() -> None:
    flags = "--steps", "20", "--batch-size", "32"
    printed, other = run_on_ranks(2, run_main, "simclr", *flags, *FEW)
    first, last = losses(printed)
    assert last < first
    assert re.search(r"^leak -?0\.\d+ ± ", printed, re.MULTILINE)
    assert other == ""


def _byol() -> tuple[Tensor, float, set[str], set[str]]:
    with redirect_stdout(io.StringIO()):
        model = byol.train(arguments(momentum=0.9), CPU)
    pairs = zip(model.target.parameters(), model.online.parameters(), strict=True)
    apart = sum(float((a - b).detach().abs().sum()) for a, b in pairs)
    return state(model), apart, modes(model.online), modes(model.target)


def test_byol_follows_slowly_and_alike_on_all_ranks() -> None:
    """Catches a target that is the online encoder, or follows another on each rank."""
    (first, apart, online, target), (second, _, _, _) = run_on_ranks(2, _byol)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert apart > 0
    assert (online, target) == ({"local"}, {"regroup"})


def test_byol_prints_a_loss() -> None:
    printed, other = run_on_ranks(2, run_main, "byol", "--steps", "10", "--batch-size", "16")
    assert 0 < losses(printed)[0] < 4
    assert other == ""


# Lightning


def _lightning(path: Path) -> tuple[Tensor, set[str], dict[str, float]]:
    """Fit as if torchrun had started this rank."""
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", r".*broadcast_buffers", FutureWarning)
    import lightning_moco

    rank, world = map(str, common.rank_of_world())
    names = "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    torchrun = dict(zip(names, (rank, rank, "0", world, world), strict=True))
    torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "0"}
    found: set[str] = set()
    step = lightning_moco.LightningMoCo.training_step

    def spy(self: Any, views: list[Tensor]) -> dict[str, Tensor]:
        found.update(
            modes(self.moco.encoder_q) | {f"{m}, keys" for m in modes(self.moco.encoder_k)}
        )
        return step(self, views)

    with (
        mock.patch.dict(os.environ, torchrun),
        mock.patch.object(lightning_moco.LightningMoCo, "training_step", spy),
        redirect_stdout(io.StringIO()),
    ):
        os.chdir(path)
        trainer = lightning_moco.train(arguments(queue=64, devices=2))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return state(trainer.lightning_module), found, metrics


def test_lightning_on_two_ranks(tmp_path: Path) -> None:
    """Catches callbacks that name no encoder, and samples that Lightning deals to ranks again."""
    (first, found, metrics), (second, _, _) = run_on_ranks(2, _lightning, tmp_path, timeout=200)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert found == {"local", "regroup, keys"}
    assert metrics.keys() == {"accuracy", "loss"}


# Measuring


def test_checkpoint_of_facebook_is_read(tmp_path: Path) -> None:
    """Catches encoders that are exchanged, a prefix that stays, and a queue on its side."""
    encoder_q, encoder_k = common.network("small"), common.network("small")
    moco = moco_v2.MoCo(encoder_q, encoder_k, 256)
    ours = moco.state_dict()
    theirs = {f"module.{name}": value for name, value in ours.items()}
    theirs["module.queue"] = theirs["module.queue"].T
    for states in ours, theirs:
        torch.save({"state_dict": states}, tmp_path / "moco.pt")
        found = measure_your_checkpoint.read(tmp_path / "moco.pt", "small")
        torch.testing.assert_close(found.encoder_q.state_dict(), encoder_q.state_dict())
        torch.testing.assert_close(found.encoder_k.state_dict(), encoder_k.state_dict())
        torch.testing.assert_close(found.queue, moco.queue)


def test_checkpoint_is_measured(trained: tuple[Path, list[str]]) -> None:
    """Catches ways to normalise keys that are one and the same, and groups that depend on ranks."""
    path, _ = trained
    printed, other = run_on_ranks(2, run_main, "measure_your_checkpoint", str(path), *FEW)
    assert other == ""
    found = dict(re.findall(r"^(.*): leak (-?\d\.\d+) ", printed, re.MULTILINE))
    assert list(found) == ["plain batch norm", "MoCo's shuffle", "regroup"]
    assert printed.count("; 128 keys in 8 batches") == 3


def test_groups_are_dealt_evenly_to_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches fewer groups than keys of a pass: two of one group, and a leak that is too small."""
    monkeypatch.setattr(common, "rank_of_world", lambda: (0, 3))
    assert common.groups_of_rank(6) == 2
    with pytest.raises(SystemExit, match="--groups 4 can't be dealt evenly to 3 ranks"):
        common.groups_of_rank(4)


def test_ways_to_normalise_keys_differ() -> None:
    """Catches one that is another one under a wrong name."""
    images = torch.randn(8, 3, 16, 16)
    encoder = common.network("small")
    encoders = measure_your_checkpoint.key_encoders(encoder, groups=4)
    plain, shuffled, regrouped = (key(images) for key in encoders.values())
    expected = torch.cat([encoder(part) for part in images.chunk(4)])
    torch.testing.assert_close(plain, expected)
    for one, other in (plain, shuffled), (plain, regrouped), (shuffled, regrouped):
        assert not torch.allclose(one, other, rtol=0.1)


def test_convert_part_only_touches_the_part() -> None:
    encoder = convert_part.convert_layers(common.network("small"), ["4", "10"], groups=4)
    found = {n: m.mode for n, m in encoder.named_modules() if isinstance(m, ShuffleBatchNorm)}
    assert found == {"1": "local", "4": "regroup", "7": "local", "10": "regroup"}


def test_convert_part_prints_a_line_for_each_layer(trained: tuple[Path, list[str]]) -> None:
    path, _ = trained
    printed, other = run_on_ranks(2, run_main, "convert_part", str(path), *FEW)
    assert other == ""
    layers = [line.partition(":")[0].split(", ") for line in printed.splitlines() if "leak" in line]
    assert [len(names) for names in layers] == [1, 1, 2, 3, 4]
    assert (layers[0], sorted(layers[-1])) == (["none"], ["1", "10", "4", "7"])


def test_layers_that_mix_are_named() -> None:
    """Catches an audit of a model that nothing is the matter with, and a mode that is not set."""
    printed, other = run_on_ranks(2, run_main, "which_layers_mix", "--batch-size", "16")
    assert other == ""
    training, evaluation = printed.split("in eval mode")
    assert training.count("BatchNorm2d") == 4
    assert evaluation.count("BatchNorm2d") == 0
    assert evaluation.count("MultiheadAttention") == 1
    assert "LayerNorm" not in printed


def _load() -> str:
    import shuffle_by_loading

    with (
        mock.patch.object(dist, "destroy_process_group"),
        redirect_stdout(io.StringIO()) as printed,
    ):
        shuffle_by_loading.main()
    return printed.getvalue()


def test_loading_instead_of_shuffling() -> None:
    printed = run_on_ranks(2, _load)[0]
    assert len(losses(printed)) == 2


# SLURM


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node with two ranks, and stand-ins for SLURM's commands."""
    scripts = {
        "srun": f'echo "$@" > {tmp_path}/srun.log\n[ -z "$SLEEP" ] || exec sleep 60\nexec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" > {tmp_path}/scontrol.log',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NODELIST": "localhost", "JOB_NUM_NODES": "1", "GPUS_ON_NODE": "2"}
    ours = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ours |= {f"SLURM_{name}": value for name, value in job.items()}
    ours |= {"MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "SLEEP": ""}
    return ours | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }


def test_slurm_job_goes_on_from_its_checkpoint(
    trained: tuple[Path, list[str]], tmp_path: Path, slurm: dict[str, str]
) -> None:
    """Catches a launch line that torchrun refuses, and a requeued job that begins anew."""
    path = tmp_path / "copy.pt"
    path.write_bytes(trained[0].read_bytes())
    flags = ["--batch-size", "32", "--steps", "41", "--checkpoint", str(path)]
    command = ["bash", str(EXAMPLES / "slurm_nccl.sh"), *flags]
    done = subprocess.run(
        command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # else it has begun with step 1
    assert torch.load(path)["step"] == 41


def test_slurm_job_is_requeued_before_its_time_is_up(tmp_path: Path, slurm: dict[str, str]) -> None:
    """Catches a trap that bash runs only when srun has ended."""
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm_nccl.sh")],
        env=slurm | {"SLEEP": "yes"},
        cwd=ROOT,
        start_new_session=True,
    )
    until = time.monotonic() + 30
    try:
        while not (tmp_path / "srun.log").exists():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        # SLURM ends the job then.
        while not (tmp_path / "scontrol.log").exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / "scontrol.log").read_text().split() == ["requeue", "7"]
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


# The page


def test_page_names_every_recipe_and_no_other() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    named = set(re.findall(r"\(\.\./examples/([^)]*)\)", page))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.is_file()}


def test_page_shows_what_is_in_the_recipes() -> None:
    """Catches Python that no file is named for; tests/test_docs.py compares it with the file."""
    shown = [one for one in blocks(ROOT / "docs" / "recipes.md") if one.language == "python"]
    assert len(shown) > 5
    assert all(one.title.startswith("examples/") for one in shown)
