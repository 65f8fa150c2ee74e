"""The GPU's benchmarks run on any device, and what they have measured stays."""

import json
import math
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_layers
import peers
import pytest
import torch

from shuffle_batchnorm.kernels import cpu


def _targets(folder: Path, part: str) -> list[dict[str, Any]]:
    """The targets of a results file, which says where it comes from."""
    record = json.loads((folder / f"{part}.json").read_text())
    assert {"device", "torch", "python", "commit", "date"} <= record.keys()
    assert record["rows"]
    found: list[dict[str, Any]] = record["targets"]
    return found


class _Threads(ThreadPoolExecutor):
    """In place of processes, which would take seconds to start."""

    def __init__(self, workers: int, *_: object, **__: object) -> None:
        super().__init__(workers)


# As many targets as a part judges.
@pytest.mark.parametrize(
    ("part", "number"),
    [
        *(("host", 6), ("profile", 4), ("step", 1), ("layer", 6), ("kernels", 4)),
        *(("compiled", 2), ("graphs", 0), ("memory", 1)),
    ],
)
def test_gpu_program_runs_anywhere(
    part: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a program that no machine at hand could try before it costs a GPU's time."""
    counts = dict.fromkeys(peers.MODES, 1.5)
    line = json.dumps({"host_ratio": counts, "launches": counts, "device": "a GPU"})
    done = subprocess.CompletedProcess([], 0, f"a table\n{line}\n")
    monkeypatch.setattr(bench_gpu, "run_bench_host", lambda: done)
    monkeypatch.setattr(bench_gpu, "ProcessPoolExecutor", _Threads)
    monkeypatch.setattr(gpu_layers, "CALLS", 3)
    assert bench_gpu.main([part, "--tiny", "--out", str(tmp_path)]) == 0
    found = _targets(tmp_path, part)
    assert len(found) == number
    assert all(math.isfinite(target["value"]) for target in found)


def test_gpu_program_keeps_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches results that are lost with a later one that is wrong, or that can't be judged."""

    def measure(_: object) -> Iterator[list[dict[str, Any]]]:
        yield [{"name": peers.PLAIN, "ratio": 1.0}]
        yield [{"name": "regroup"}]

    def measure_and_fail(_: object) -> Iterator[list[dict[str, Any]]]:
        yield [{"name": peers.PLAIN, "ratio": 1.0}]
        raise RuntimeError("wrong")

    memory = bench_gpu.PARTS["memory"]
    for broken, error, rows in ((measure, KeyError, 2), (measure_and_fail, RuntimeError, 1)):
        monkeypatch.setitem(bench_gpu.PARTS, "memory", memory._replace(measure=broken))
        with pytest.raises(error):
            bench_gpu.main(["memory", "--tiny", "--out", str(tmp_path)])
        assert [row["value"] for row in _targets(tmp_path, "memory")] == [1.0]
        assert len(json.loads((tmp_path / "memory.json").read_text())["rows"]) == rows


def test_gpu_program_fails_when_a_result_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a time of a kernel that is wrong."""
    true = cpu.block_affine
    monkeypatch.setattr(cpu, "block_affine", lambda *args: 1.01 * true(*args))
    with pytest.raises(RuntimeError, match="block_affine"):
        bench_gpu.main(["kernels", "--tiny", "--out", str(tmp_path)])
    assert not (tmp_path / "kernels.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_program_refuses_a_machine_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a silent success where nothing was measured."""
    assert bench_gpu.main(["kernels"]) == 1
    assert "NOTHING WAS MEASURED" in capsys.readouterr().out
