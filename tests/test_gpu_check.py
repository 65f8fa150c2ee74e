"""`make gpu-check`: each part has its limit and leaves its result, with torch and pytest alone."""

import json
import os
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_check
import pytest
import torch
from harness import ROOT

from gpu_cases import FEW

# A Python that has a GPU's torch need not have these.
MISSING = (
    *("accelerate", "jinja2", "kornia", "lightly", "lightning", "matplotlib", "PIL"),
    *("pytest_timeout", "scipy", "sklearn", "tensorboard", "timm", "torchvision", "tqdm"),
    *("transformers", "tyro", "xdist"),
)
COLLECT = f"""
import sys
sys.modules.update(dict.fromkeys({MISSING}))  # None: an import of it raises
import bench_gpu, gpu_check, pytest
files = [part.command[-1] for part in gpu_check.test_parts()]
sys.exit(pytest.main(["--collect-only", "-q", "-m", gpu_check.CASES, *files]))
"""


def _part(name: str, code: str, limit: float = 60.0) -> gpu_check.Part:
    return gpu_check.Part(name, [sys.executable, "-c", code], limit)


def _run(parts: list[gpu_check.Part], out: Path, total: float = 60.0) -> dict[str, dict[str, Any]]:
    gpu_check.run(parts, "test", out, total, jobs=2)
    rows = json.loads((out / "test.json").read_text())["rows"]
    return {row["part"]: row for row in rows}


def test_a_part_that_fails_or_hangs_does_not_end_the_others(tmp_path: Path) -> None:
    """Catches a hang that takes the machine's time, processes left behind, a lost log or result."""
    hang = (
        "import subprocess, sys, time; print('before', flush=True);"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    parts = [
        _part("fails", "raise SystemExit(3)"),
        _part("hangs", hang, 1.5),
        _part("passes", "print('== 3 passed in 1 s ==')"),
    ]
    rows = _run(parts, tmp_path)
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "fails": "FAILED",
        "hangs": "OVERRAN",
        "passes": "passed",
    }
    assert rows["fails"]["status"] == 3
    assert rows["passes"]["last_line"] == "3 passed in 1 s"
    assert (tmp_path / "hangs.log").read_text() == "before\n"
    child = Path("/proc") / (tmp_path / "pid").read_text()
    for _ in range(100):
        # Killed, though perhaps not yet waited for by the process that inherited it.
        if not child.exists() or "\nState:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("a process of a part that was killed still runs")


def test_where_time_runs_out_the_last_parts_are_missing(tmp_path: Path) -> None:
    """Catches a total that nobody keeps, and figures of an earlier run left for this one's."""
    for name in ("first", "last"):
        (tmp_path / f"{name}.json").write_text("{}")
    parts = [_part("first", "import time; time.sleep(600)"), _part("last", "")]
    gpu_check.run(parts, "bench", tmp_path, 0.5, jobs=1)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {"device", "torch", "commit"} <= record.keys()
    assert [row["outcome"] for row in record["rows"]] == ["OVERRAN", "NOT RUN"]
    assert not list(tmp_path.glob("first.json")) + list(tmp_path.glob("last.json"))


def test_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a check that is green when a part is red, or when nothing ran."""
    target = {"name": "time", "value": 2.0, "limit": 1.0, "where": "here", "is_least": False}
    record = json.dumps({"targets": [target]})
    good = _part("good", f"open({str(tmp_path / 'good.json')!r}, 'w').write({record!r})")
    bad = _part("bad", "raise SystemExit(1)")
    monkeypatch.setattr(gpu_check, "bench_parts", lambda *_: [good, bad])
    main = [*("bench", "--tiny", "--out", str(tmp_path)), "--only"]
    assert gpu_check.main([*main, "good"]) == 0
    assert "MISSED" in capsys.readouterr().out, "slow is no failure"
    assert gpu_check.main([*main, "good", "bad"]) == 1
    assert "1 parts passed, NOT: bad" in capsys.readouterr().out
    assert gpu_check.main([*main, "nothing"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a silent success where nothing was checked."""
    assert gpu_check.main(["test", "bench"]) == 1
    assert "NOTHING WAS CHECKED" in capsys.readouterr().out


def test_every_benchmark_has_a_limit() -> None:
    assert gpu_check.BENCHMARKS.keys() == bench_gpu.PARTS.keys()


def test_torch_and_pytest_are_enough() -> None:
    """Catches an import of an extra, and a chosen case that has another name by now."""
    paths = (ROOT / name for name in ("src", "benchmarks"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    for name, patterns in FEW.items():
        for pattern in patterns:
            assert any(
                test.startswith(f"{name}[") and fnmatchcase(test[len(name) + 1 : -1], pattern)
                for test in tests
            ), f"tests/gpu_cases.py: no case of {name} is called {pattern}"
    assert any("test_cuda_gives_what_the_cpu_gives" in test for test in tests)
