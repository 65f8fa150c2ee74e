"""The Triton kernels compile for a real GPU, also on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

TESTS = Path(__file__).parents[1]
# shape, dtype, channels-last, blocks, grouped: and the bytes that a thread should load at once
CASES = [
    ((8, 64, 8, 8), "float32", False, 2, False, 16),
    ((8, 64, 8, 8), "bfloat16", False, 8, True, 16),
    ((8, 64, 8, 8), "bfloat16", True, 2, False, 16),
    ((40, 24, 14, 14), "float32", True, 1, False, 16),  # 24 is no multiple of 16; splits
    ((8, 6, 14, 14), "bfloat16", False, 2, False, 8),  # L = 4 * 49
    ((8, 6, 7, 7), "float16", False, 2, False, 2),
    ((8, 3, 9), "float64", True, 1, False, 8),
    ((8, 130), "float32", False, 8, False, 8),
]
HEAVY = {"moments", "affine", "grad_sums", "grad_affine"}
SMALL = {
    *("finish_moments", "finish_sums"),
    *("pack_moments", "mix_moments", "pack_sums", "mix_sums"),
}


def test_every_kernel_compiles(tmp_path: Path) -> None:
    """Catches what the interpreter forgives: types, shapes, int32 offsets, narrow accesses."""
    path = os.pathsep.join(
        [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, str(TESTS / "kernels" / "compile_kernels.py")],
        input="\n".join(json.dumps(case[:5]) for case in CASES),
        env=os.environ
        | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for number, name, widest_access, offsets in kernels:
        case = CASES[number]
        if name in HEAVY:
            assert widest_access >= case[5], (name, case)
            assert offsets == (["i64"] if case[1].endswith("16") else []), (name, case)
    assert {number for number, *_ in kernels} == {*range(len(CASES))}
    assert {name for _, name, *_ in kernels} == HEAVY | SMALL
