"""What a step of each way of shuffling sends, and what that costs on gloo.

The patterns and their bytes are exact. Times are a model, fitted to exchange.json and
batch_shuffle.json in benchmarks/results. The one of NCCL is in nccl_model.py.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from shuffle_batchnorm.norm.mixing import Options, make_plan
from shuffle_batchnorm.norm.routes import find_route

# ResNet-50: a stem, then stages of (blocks, width); a block has layers of width, width, 4 width,
# and the first of a stage another of 4 width in its shortcut.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
RESNET50 = [64] + [
    channels
    for blocks, width in STAGES
    for block in range(blocks)
    for channels in (width, width, *([4 * width] * (2 if block == 0 else 1)))
]
SAMPLES = 32  # per rank
IMAGE, FEATURES = 4 * 3 * 224 * 224, 4 * 128  # bytes


class Call(NamedTuple):
    """One collective of a rank; `size` are the bytes of its own part, or on average per peer."""

    kind: str
    size: float
    peers: int = 0  # of an all_to_all: to how many ranks it sends


def received(call: Call, world: int) -> float:
    """Bytes that reach a rank from others; all_reduce as a ring does it."""
    return {
        "all_gather": (world - 1) * call.size,
        "all_reduce": 2 * (world - 1) / world * call.size,
        "broadcast": call.size,
        "all_to_all": call.peers * call.size,
    }[call.kind]


def layer(way: str, world: int, channels: int, direction: str = "forward") -> list[Call]:
    """What one layer sends, with one group per rank."""
    forward = direction == "forward"
    row = 4 * (2 * channels + forward)  # the count travels forward
    if way == "seed":
        parts = (4, 4 * channels, 4 * channels)
        return [Call("all_gather", size) for size in parts] if forward else []
    if way in ("SyncBatchNorm", "sync"):
        return [Call("all_gather" if forward else "all_reduce", row)]
    splits = find_route(make_plan(Options(way), world, rank=0)).send_splits
    peers = sum(rows > 0 for rows in splits)  # as many send to a rank as it sends to
    return [Call("all_to_all", row * sum(splits) / peers, peers)] if peers else []


def moco(samples: int, image: int, features: int, world: int) -> list[Call]:
    order = Call("broadcast", 8 * samples * world)
    return [Call("all_gather", samples * image), order, Call("all_gather", samples * features)]


def batch_shuffle(samples: int, image: int, features: int, world: int) -> list[Call]:
    """Every rank sends its samples to all ranks, or if W doesn't divide N to random ones.

    After the first call of a kind, which also compares the ranks' calls.
    """
    if samples % world == 0:
        peers, leaving = world - 1, samples * (world - 1) / world
    else:
        peers, leaving = min(samples, world - 1), samples
    return [Call("all_to_all", leaving * size / peers, peers) for size in (image, features)]


def key_encoder(way: str, world: int) -> list[Call]:
    """What the forward pass of a ResNet-50 key encoder sends."""
    if way == "MoCo's shuffle":
        return moco(SAMPLES, IMAGE, FEATURES, world)
    if way == "batch_shuffle":
        return batch_shuffle(SAMPLES, IMAGE, FEATURES, world)
    return [call for channels in RESNET50 for call in layer(way, world, channels)]


class Point(NamedTuple):
    """What was measured: the calls of a rank, among how many ranks, and their time."""

    calls: list[Call]
    world: int
    seconds: float


class Gloo(NamedTuple):
    """Seconds per unit of `_units`: what gloo costs where W processes share a few cores."""

    hop: float
    message: float
    byte: float

    def seconds(self, calls: Iterable[Call], world: int, cores: int) -> float:
        units = [_units(call, world, cores) for call in calls]
        return float(sum(np.dot(self, unit) for unit in units))


def _units(call: Call, world: int, cores: int) -> tuple[float, float, float]:
    """Hops in a row, messages and bytes, times the processes that take turns on a core."""
    crowd = max(1.0, world / cores)
    hops, messages = {
        "all_gather": (world - 1, world - 1),  # a ring
        "all_reduce": (2 * (world - 1), 2 * (world - 1)),
        "broadcast": (math.ceil(math.log2(world)), 1),
        "all_to_all": (1, world - 1),  # gloo sends the empty messages as well
    }[call.kind]
    return crowd * hops, crowd * messages, crowd * received(call, world)


def fit(points: list[Point], cores: int) -> Gloo:
    """Make the logarithm of model over measured small; outliers count less."""
    units = np.array(
        [
            np.sum([_units(call, point.world, cores) for call in point.calls], axis=0)
            for point in points
        ]
    )
    measured = np.log([point.seconds for point in points])

    def miss(logarithms: Any) -> Any:
        return np.log(units @ np.exp(logarithms)) - measured

    start = np.log([1e-4, 1e-4, 1e-9])
    return Gloo(*map(float, np.exp(least_squares(miss, start, loss="soft_l1").x)))


def rows_of_today(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What results/exchange.json has of exchanges that are still made, and prints what is left out.

    Left out are layers that were measured with other messages or bytes than the model's.
    """
    rows = []
    for row in record["rows"]:
        if row["name"] not in ("all_to_all", "isend"):
            calls = _calls(row)
            expected = len(calls), round(sum(received(call, row["world_size"]) for call in calls))
            if expected != (row["messages"], row["received"]):
                where = [row[key] for key in ("name", "world_size", "channels", "direction")]
                print(f"left out, measure again: {where} in {row['messages']} messages")
                continue
        rows.append(row)
    return rows


def _calls(row: dict[str, Any]) -> list[Call]:
    return layer(row["name"], row["world_size"], row["channels"], row["direction"])


def rows_measured(rows: list[dict[str, Any]]) -> list[Point]:
    """The points of layers in `rows_of_today`."""
    layers = (row for row in rows if row["name"] not in ("all_to_all", "isend"))
    return [Point(_calls(row), row["world_size"], row["median"]) for row in layers]


def samples_measured(record: dict[str, Any]) -> dict[tuple[str, int], Point]:
    """What results/batch_shuffle.json has, by way and W."""
    points = {}
    for row in record["rows"]:
        world, ways = row["world_size"], {"MoCo": moco, "ours": batch_shuffle}
        if row["name"] in ways:
            calls = ways[row["name"]](32, 4 * 3 * 96 * 96, 4 * 128, world)
            points[row["name"], world] = Point(calls, world, row["median"])
    return points


def misses(points: list[Point], seconds: Callable[[list[Call], int], float]) -> list[float]:
    """The model's time over that measured, in order."""
    return sorted(seconds(point.calls, point.world) / point.seconds for point in points)
