"""A launch straight to the compiled kernel is the one that ``kernel[grid]`` would have made."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import launch

TESTS = Path(__file__).parents[1]


def test_a_direct_launch_has_the_same_arguments(tmp_path: Path) -> None:
    """Catches arguments in another order, a kernel for aligned memory launched on other."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "kernels" / "launch_kernels.py")],
        env=os.environ
        | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case["launches"] for case in found] == [6, 4, 8] * 2
    # Without a weight these are other kernels than the layer's.
    assert [case["recorded"] for case in found] == [2, 1, None] * 2
    # Of ranks, what packs rows and merges moments is launched directly all the same.
    assert [case["unaligned"] for case in found] == [6, 4, 5] * 2
    for case in found:
        assert case["same"], case
        assert case["compiled"] == case["unknown"] == case["launches"]
        assert case["found"] == 0


@pytest.mark.parametrize(
    ("triton", "backend", "known"),
    [("3.6.0", "cuda", True), ("3.6.0+git", "cuda", True), ("3.5.1", "hip", False),
     ("3.60.0", "cuda", False), ("4.0.0", "cuda", False)],
)  # fmt: skip
def test_only_launchers_that_were_read_are_called(
    triton: str, backend: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a call of what another version, or another vendor's driver, has in its place."""
    monkeypatch.setattr("triton.__version__", triton)
    launch._is_version_known.cache_clear()
    target = SimpleNamespace(backend=backend)
    assert launch.is_known(SimpleNamespace(metadata=SimpleNamespace(target=target))) is known
    assert not launch.is_known(None)  # the interpreter has compiled nothing
    launch._is_version_known.cache_clear()
