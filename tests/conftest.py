"""What every test gets: a seed, an end to the ranks' processes, and no gpu test without a GPU."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import ranks
from gpu_cases import mark_spare

# Triton asks for this when it is imported, so it must be said before any test.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _end_of_ranks() -> Iterator[None]:
    yield
    ranks.stop_all()


def pytest_addoption(parser: pytest.Parser) -> None:
    # A Python that has a GPU's torch may lack pytest-timeout, whose option is in pyproject.toml.
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "of pytest-timeout, which is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_spare(items)


def pytest_configure() -> None:
    if torch.cuda.is_available() and find_spec("triton"):
        from triton import knobs

        knobs.compilation.listener = _note_compiled


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _compiled:
        terminalreporter.write_line(
            f"Triton compiled {len(_compiled)} kernels in {sum(_compiled):.0f} s"
        )


_compiled: list[float] = []  # s, for each kernel that was not in Triton's cache


def _note_compiled(*, times: Any, cache_hit: bool, **_: object) -> None:
    if not cache_hit:
        _compiled.append(times.total / 1e6)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Catch an output that a kernel does not write, and that is right by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
