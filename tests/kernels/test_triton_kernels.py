"""The Triton kernels compile for a real GPU, also on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

TESTS = Path(__file__).parents[1]
# shape, dtype, channels-last, blocks, grouped: and the bytes that a thread should load by each
# access, if it is to sum whole tiles
CASES = [
    ((8, 64, 8, 8), "float32", False, 2, False, 16),
    ((64, 64, 8, 8), "bfloat16", False, 8, True, 16),
    ((8, 64, 8, 8), "bfloat16", True, 2, False, 16),
    ((40, 24, 14, 14), "float32", True, 1, False, 16),  # 24 is no multiple of 16; splits
    ((8, 8, 14, 14), "bfloat16", False, 2, False, 16),  # L = 4 * 49, but C * L = 32 * 49
    ((8, 16, 7, 7), "bfloat16", False, 1, False, 16),
    ((8, 6, 7, 7), "float16", False, 2, False, 4),
    ((8, 3, 9), "float64", True, 1, False, 8),
    ((8, 130), "float32", False, 8, False, 8),
]
HEAVY = {"moments", "affine", "grad_sums", "grad_affine"}
SMALL = {
    *("finish_moments", "finish_sums"),
    *("pack_moments", "mix_moments", "pack_sums", "mix_sums"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The name of each kernel, the types of its offsets to halves, its code; in a list per case."""
    path = os.pathsep.join(
        [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    )
    cache = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(TESTS / "kernels" / "compile_kernels.py")],
        input="\n".join(json.dumps(case[:5]) for case in CASES),
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(compiled: list[list[Any]]) -> None:
    """Catches what the interpreter forgives: types, shapes, int32 offsets."""
    assert len(compiled) == len(CASES)
    for case, kernels in zip(CASES, compiled, strict=True):
        for name, offsets, _ in kernels:
            if name in HEAVY:
                assert offsets == (["i64"] if case[1].endswith("16") else []), (name, case)
    assert {name for kernels in compiled for name, *_ in kernels} == HEAVY | SMALL


def test_memory_is_read_and_written_in_wide_accesses(compiled: list[list[Any]]) -> None:
    """Catches a thread that loads values one by one where it could load 16 bytes at once."""
    for case, kernels in zip(CASES, compiled, strict=True):
        for name, _, code in kernels:
            if name in HEAVY:
                accesses = code["stores" if name.endswith("affine") else "loads"]
                assert max(map(int, accesses)) >= case[5], (name, case)


def test_the_loops_of_sums_are_lean(compiled: list[list[Any]]) -> None:
    """Catches a mask per value, loads that wait, spilled registers, sums across threads."""
    for case, kernels in zip(CASES, compiled, strict=True):
        for name, _, code in kernels:
            if name not in ("moments", "grad_sums"):
                continue
            loop = code["loops"][0]  # over whole tiles; that of moments over others comes next
            assert loop["spills"] == loop["exchanges"] == 0, (name, case)
            loads = sum(loop["loads"].values())
            if name == "moments":
                assert loop["predicates"] <= 2, case  # the end of the loop
            if case[5] == 16:
                assert loop["predicates"] <= loads + 4, (name, case)
                assert loop["loads"].keys() == {"16"}, (name, case)
                assert 2 * loop["at_once"] >= loads, (name, case)
                values = 16 * loads / (2 if case[1].endswith("16") else 4)
                values /= 2 if name == "grad_sums" else 1
                assert loop["instructions"] <= 9 * values, (name, case)
