"""The model of docs/scale.md, which nobody here can measure, beside what others have published."""

import math
from pathlib import Path

import draw_scale
import pytest
from nccl_model import NCCL, PUBLIC, Public
from scale_model import Call, key_encoder

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")


def _name(point: Public) -> str:
    return f"{point.source}-{point.call.size:.0f}"


@pytest.mark.parametrize("point", [p for p in PUBLIC if not p.unlike], ids=_name)
def test_the_model_is_within_a_factor_of_two_of_what_was_measured(point: Public) -> None:
    """Catches a constant of another year's NCCL, and bytes that are counted twice."""
    assert 1 / 2 <= point.ratio <= 2


@pytest.mark.parametrize("point", [p for p in PUBLIC if p.unlike], ids=_name)
def test_what_is_left_out_is_far_off(point: Public) -> None:
    """Catches a measurement that is called unlike the model and is not."""
    assert not 1 / 2 <= point.ratio <= 2


def test_the_page_has_the_numbers_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a table that was not copied after the model had changed."""
    draw_scale.print_modelled()
    draw_scale.print_public()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in PAGE and "W = " not in row] == []


@pytest.mark.parametrize(("size", "logged"), [(128, 25.2148), (4096, 25.8749)])
def test_a_call_in_a_graph_takes_what_nccls_own_model_says(size: int, logged: float) -> None:
    """Catches a formula that is not that of tuning.cc: its log for 3 nodes of 8 in nccl#1453."""
    predicted = NCCL(graph=True).microseconds(Call("all_reduce", size), world=24)
    assert predicted == pytest.approx(logged, rel=0.02)


@pytest.mark.parametrize("way", ["SyncBatchNorm", "swap", "regroup", "batch_shuffle"])
@pytest.mark.parametrize("world", [2, 8, 16, 1024])
def test_eager_takes_longer_by_the_launches(way: str, world: int) -> None:
    """Catches columns that are mixed up."""
    calls = key_encoder(way, world)
    graph, eager = (NCCL(graph).seconds(calls, world) for graph in (True, False))
    peers = sum(max(0, call.peers - 1) for call in calls)
    nccl = NCCL(graph=False)
    launches = len(calls) * nccl.launch + peers * nccl.peer
    assert math.isclose(eager - graph, 1e-6 * launches, rel_tol=1e-6)
