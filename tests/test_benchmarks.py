"""The benchmarks run, check what they time, and write results that can be judged.

Small tensors, few rounds, and no time is looked at: speed is for a machine that is idle.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import bench_batch_shuffle
import bench_exchange
import bench_host
import bench_kernels
import bench_key_encoder
import bench_layer
import bench_step
import harness
import peers
import pytest
import targets
import torch
import torch.distributed as dist
from meters import received_messages
from torch import Tensor, nn

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.kernels import cpu
from shuffle_batchnorm.moco.ranks.launch import Rank

LAYER = ["--batch=8", "--groups", "1", "4", "--shapes", "4x5x6", "6x3x3", "--memory-batch=0"]
STEP = ["--ranks=1", "--network=small", "--size=16", "--batch=8"]
SHORT = ["--rounds=3", "--seconds=0"]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for results, one thread, and no wait for the compiler."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def _record(folder: Path, name: str) -> dict[str, Any]:
    """A results file, which says where it comes from and holds finite numbers."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {name}.json")

    text = (folder / f"{name}.json").read_text()
    record: dict[str, Any] = json.loads(text, parse_constant=refuse)
    assert {"device", "threads", "torch", "python", "commit", "date"} <= record.keys()
    assert record["rows"]
    return record


@pytest.mark.parametrize("options", [[], ["--channels-last"], ["--compiled"]])
def test_layer(options: list[str], results: Path) -> None:
    """Catches a contestant that is left out, or a ratio that is not to plain batch norm."""
    bench_layer.main([*LAYER, *SHORT, *options, "--save", "layer"])
    record = _record(results, "layer")
    suffix = ", compiled" if options == ["--compiled"] else ""
    expected = {"nn.BatchNorm2d"} | {
        f"{mode}, groups={groups}{suffix}"
        for mode in ("local", "swap", "regroup")
        for groups in (1, 4)
    }
    expected |= {
        "": {"split-BN view", "naive torch"},
        "--channels-last": {"naive torch"},
        "--compiled": {"nn.BatchNorm2d, compiled"},
    }["".join(options)]
    assert {row["name"] for row in record["rows"]} == expected
    assert len(record["rows"]) == 2 * len(expected)
    for row in record["rows"]:
        assert row["channels_last"] == (options == ["--channels-last"])
        if row["name"] == "nn.BatchNorm2d":
            assert row["ratios"]["nn.BatchNorm2d"]["both"] == [1, 1, 1]


def test_resnet50_has_53_layers_of_12_shapes() -> None:
    """Catches shapes of another network or image size."""
    shapes = bench_layer.resnet50_shapes()
    assert len(shapes) == 12
    assert sum(shapes.values()) == 53
    assert shapes[64, 112, 112] == 1
    assert shapes[2048, 7, 7] == 4


def _layers_on_ranks() -> list[dict[str, Any]]:
    rank = Rank(dist.get_rank(), 2, torch.device("cpu"))
    options = bench_layer.Options([(4, 5, 6)], 8, [1], torch.float32, False, False, 0.0, 3)
    return bench_layer.measure(rank, options)


def test_layer_on_ranks() -> None:
    """Catches a seed's pattern that takes its own statistics, and ranks that drift apart."""
    rows, others = run_on_ranks(2, _layers_on_ranks, timeout=120)
    assert {"three all_gathers", "sync, groups=1"} <= {row["name"] for row in rows}
    assert [row["rounds"] for row in rows] == [row["rounds"] for row in others] == [3] * len(rows)


class _Wrong(nn.BatchNorm2d):
    """Right in its output; its gradient is not."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y.detach() + 0.5 * (y - y.detach())


def test_a_wrong_layer_is_not_timed() -> None:
    """Catches a check that looks at outputs only, or at nothing."""
    x, dy = torch.randn(2, 8, 4, 5, 5)
    right = ShuffleBatchNorm(4, mode="local")
    peers.check("right", peers.Contestant(nn.BatchNorm2d(4), right), x, dy)
    with pytest.raises(RuntimeError, match=r"wrong: dx of \(8, 4, 5, 5\) is off by"):
        peers.check("wrong", peers.Contestant(_Wrong(4), right), x, dy)
    other = ShuffleBatchNorm(4, mode="swap", groups=2)
    with pytest.raises(RuntimeError, match="other: output"):
        peers.check("other", peers.Contestant(other, right), x, dy)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a truth that runs on the very kernels that it should judge."""
    true = cpu.block_affine
    monkeypatch.setattr(cpu, "block_affine", lambda *args: 1.01 * true(*args))
    with pytest.raises(RuntimeError, match="local, groups=1: output"):
        bench_layer.main([*LAYER, *SHORT])
    with pytest.raises(RuntimeError, match="block_affine of"):
        bench_kernels.main(["--shapes=8x4x5x6", *SHORT])


def test_kernels(results: Path) -> None:
    """Catches a kernel, layout or number of blocks that is left out."""
    bench_kernels.main(["--shapes=8x4x5x6", "--blocks", "1", "4", *SHORT, "--save"])
    rows = _record(results, "kernels")["rows"]
    assert len({(row["kernel"], row["layout"], row["blocks"]) for row in rows}) == 4 * 2 * 2


@pytest.mark.parametrize("options", [[], ["--compiled"]])
def test_step(options: list[str], results: Path) -> None:
    """Catches a kind of batch norm that a step does not train with."""
    bench_step.main([*STEP, *SHORT, *options, "--save"])
    rows = _record(results, "step_compiled" if options else "step")["rows"]
    kinds = ["local", "swap", "regroup", "sync", "batch-shuffle"]
    assert [row["bn"] for row in rows if row["step"] == "moco"] == kinds
    supervised = [row["bn"] for row in rows if row["step"] == "supervised"]
    assert supervised == ["nn.BatchNorm2d", *kinds[:-1]]


def test_percent_points_and_ratios() -> None:
    """Catches other percentiles, and a ratio of the peer's time to one's own."""
    eleven = [float(k) for k in range(11)]
    assert harness.spread(eleven) == (5.0, 2.0, 8.0)
    assert harness.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == pytest.approx((3.0, 2.4, 3.6))
    assert harness.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_a_slower_contestant_has_a_larger_ratio() -> None:
    """Catches ratios the wrong way round, in the harness and in the layer's summary."""
    timings = harness.interleaved({"peer": lambda: None, "slow": lambda: time.sleep(0.01)}, 5)
    assert timings["peer"].ratio == 1.0
    assert timings["slow"].ratio > 2.0
    assert timings["slow"].median > 0.009


def test_laps_are_those_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches times from the start in place of stages, and one that always follows the same."""
    clock = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))  # type: ignore[attr-defined]
    stopwatch = harness.Stopwatch("cpu")
    stopwatch.lap()
    stopwatch.lap()
    assert stopwatch.read() == ([1.0, 2.0], 3.0)
    order: list[str] = []
    monkeypatch.undo()

    def run(name: str, lap: Callable[[], None]) -> None:
        order.append(name)
        lap()

    runs = {name: partial(run, name) for name in "abc"}
    laps = harness.laps_of(runs, "cpu", 0.0, least=20, most=20)
    rounds = ["".join(order[k : k + 3]) for k in range(3, 63, 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "all orders"
    assert [len(laps[name].stages) for name in "abc"] == [20, 20, 20]
    laps = harness.laps_of(runs, "cpu", 0.0, least=5, most=5, slow="b")
    assert [len(laps[name].stages) for name in "abc"] == [5, 3, 5]


def _barriers() -> int:
    runs = {name: partial(harness.one_stage, lambda: None) for name in "ab"}
    with mock.patch.object(dist, "barrier", wraps=dist.barrier) as barrier:
        harness.laps_of(runs, "cpu", 0.0, least=3, most=3)
    return barrier.call_count


def test_ranks_start_each_contestant_together() -> None:
    """Catches a contestant that pays for the one before it on another rank."""
    assert run_on_ranks(2, _barriers) == [6, 6]


def test_results_say_where_they_come_from(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the GPU's name, or many threads, for ranks on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    torch.set_num_threads(2)
    harness.save("here", [{}], on_ranks=True, on_gpu=False)
    harness.save("there", [{}])
    here, there = (_record(results, name) for name in ("here", "there"))
    assert here["threads"] == 1
    assert here["device"] != there["device"] == "a GPU"


def test_results_are_whole(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a file in place of the last results, where a benchmark is killed."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    harness.save("here", [{"n": 1}])
    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        harness.save("here", [{"n": 2}])
    assert _record(results, "here")["rows"] == [{"n": 1}]


def _rounds_on_ranks() -> int:
    seconds = [0.0, 60.0][dist.get_rank()]
    return len(list(harness.rounds_within(seconds, least=2, most=5)))


def test_ranks_take_as_many_rounds() -> None:
    """Catches a rank that goes on alone, and waits for the others for ever."""
    assert run_on_ranks(2, _rounds_on_ranks) == [2, 2]


def _steps_on_ranks() -> list[str]:
    rank = Rank(dist.get_rank(), 2, torch.device("cpu"))
    options = bench_step.Options(
        ["moco", "supervised"], ["local", "regroup", "batch-shuffle"], "small", 8, 16, 2,
        False, False, False, True, 0.0, 3,
    )  # fmt: skip
    rows = bench_step.measure(rank, options)
    assert {row["rounds"] for row in rows} == {3}
    return [row["bn"] for row in rows]


def test_step_on_ranks() -> None:
    """Catches a step that DistributedDataParallel refuses, or whose floor is left out."""
    kinds, others = run_on_ranks(2, _steps_on_ranks, timeout=120)
    moco, supervised = ["local", "regroup", "batch-shuffle"], ["local", "regroup"]
    assert kinds == others == [*moco, peers.PLAIN, peers.IN_STEP, *supervised]


def _in_step() -> tuple[float, int]:
    plain, in_step = nn.BatchNorm2d(5), peers.InStepBatchNorm(5)
    x, dy = torch.randn(2, 4, 5, 3, 3)
    with received_messages() as messages:
        results = [peers._results(layer, x, dy) for layer in (plain, in_step)]
    errors = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return max(errors), len(messages)


def test_the_floor_of_a_step_is_batch_norm_and_two_messages() -> None:
    """Catches a floor that computes something else, or that meets its peers in one direction."""
    assert run_on_ranks(2, _in_step) == [(0.0, 2)] * 2


def test_batch_shuffle(results: Path) -> None:
    """Catches options that no longer reach the ranks."""
    bench_batch_shuffle.main(["--world-sizes=2", "--rounds=3", "--save"])
    assert len(_record(results, "batch_shuffle")["rows"]) == 4


def test_exchange(results: Path) -> None:
    """Catches a pattern or direction that is left out."""
    bench_exchange.main(["--world-sizes=2", "--channels=8", "--rounds=3", "--save"])
    rows = _record(results, "exchange")["rows"]
    ways = {(row["direction"], row["name"]) for row in rows}
    assert len(rows) == len(ways) == 7 + 4


def test_key_encoder(results: Path) -> None:
    """Catches a way to shuffle a key encoder that is left out."""
    bench_key_encoder.main(["--world-sizes=2", "--networks=small", "--rounds=3", "--save"])
    assert len(_record(results, "key_encoder")["rows"]) == 5


def test_host(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a contestant that is left out, launches not counted, and JSON that is not last."""
    bench_host.main(["--runs=1", "--save"])
    record = _record(results, "host")
    rows = {row["name"]: row for row in record["rows"]}
    modes = {"local", "swap", "regroup"}
    assert record["host_ratio"].keys() == record["launches"].keys() == modes
    of_ranks = {"sync", "swap", "regroup"}
    assert record["host_ratio_ranks"].keys() == record["launches_ranks"].keys() == of_ranks
    assert rows.keys() >= modes | {f"{mode} of 2 ranks" for mode in of_ranks}
    plain = rows["nn.BatchNorm2d"]
    for mode in modes:
        row = rows[mode]
        assert row["ratio"] == pytest.approx(row["seconds"] / plain["seconds"], rel=1e-2)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["host_ratio"].keys() == {"local", "swap", "regroup"}
    assert last["launches"] == record["launches"] == {"local": 6, "swap": 6, "regroup": 6}
    assert last["device"].endswith("stand-ins")


def test_targets_are_read_from_results(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a change of a results file that its reader does not know of."""
    bench_layer.main([*LAYER, *SHORT, "--save"])
    record = _record(results, "layer")
    memory = [{"name": "regroup, groups=4", "ratio": 1.5}]
    harness.save("layer", record["rows"], summary=record["summary"], memory=memory)
    bench_layer.main([*LAYER, *SHORT, "--channels-last", "--save", "layer_channels_last"])
    bench_layer.main([*LAYER, *SHORT, "--compiled", "--save", "layer_compiled"])
    shutil.copy(results / "layer_compiled.json", results / "layer_channels_last_compiled.json")
    bench_step.main([*STEP, *SHORT, "--compiled", "--steps", "supervised", "--save"])
    bench_exchange.main(["--world-sizes=2", "--channels=512", "--rounds=2", "--save"])
    bench_batch_shuffle.main(["--world-sizes=2", "--rounds=2", "--save"])
    bench_host.main(["--runs=1", "--save"])
    targets.main()
    lines = capsys.readouterr().out.split("target  ")[-1].splitlines()[1:]
    assert len(lines) == 3 + 2 + 1 + 2 + 2 + 2 + 1 + 1
    (line,) = (line for line in lines if line.startswith("peak memory"))
    assert line.split()[-5:] == ["<=", "1.02", "MISSED", "regroup,", "groups=4"]


def test_rounds_end_with_the_time_or_the_count() -> None:
    """Catches rounds without end, and a budget that leaves fewer rounds than a median takes."""
    assert len(list(harness.rounds_within(0.0, least=3, most=9))) == 3
    assert len(list(harness.rounds_within(60.0, least=3, most=9))) == 9
