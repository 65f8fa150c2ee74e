"""What a call costs on H100s by a model of NCCL, beside what others have measured and published.

Nothing here was measured by us. Every number has its source.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from scale_model import Call, received


class Protocol(NamedTuple):
    """Of an algorithm in NCCL's own tuning model.

    Attributes:
        base: microseconds of a call.
        nvlink: microseconds of a hop inside a node.
        network: of a hop between nodes.
        share: of the link's bandwidth.
        most: bytes per second at most, inside a node and between nodes.
    """

    base: float
    nvlink: float
    network: float
    share: float
    most: tuple[float, float] = (math.inf, math.inf)


class NCCL(NamedTuple):
    """Nodes of 8 H100, with a network card of 400 Gbit/s for each; microseconds, bytes per second.

    A call in a CUDA graph takes what NCCL's own model says, and one that is launched on its own
    `launch` more.
    """

    graph: bool
    node: int = 8  # GPUs that share NVLink
    # NVIDIA/nccl 2.30.7, commit 5067397, src/graph/tuning.cc: ring LL, LL128, Simple; tree LL.
    ring: tuple[Protocol, ...] = (
        Protocol(6.6, 0.6, 2.7, 1 / 2, (141e9, 20.4e9)),
        Protocol(14.0, 1.9, 4.0, 0.92),
        Protocol(8.4, 3.4, 14.0, 1.0),
    )
    tree: Protocol = Protocol(6.8, 0.6, 5.0, 1 / 3.8, (141e9, 20.4e9))
    post: float = 1.0  # same source: a hop of a ring over several nodes takes at least this long
    low_latency: int = 16384  # bytes per peer up to which point to point is LL (src/enqueue.cc)
    # What is missing to 19.2 µs for 128 B on 8 H100: Triton-distributed#57.
    launch: float = 4.2
    peer: float = 1.0  # a guess, for each further peer of an all_to_all that is not in a graph
    nvlink: float = 370e9  # what is left of 450 with the protocol: nccl-tests#212
    nic: float = 47e9  # of 400 Gbit/s, 46 to 48: nccl-tests#290
    connection: float = 0.2  # s, first message to a new peer: nccl#1487

    def seconds(self, calls: Iterable[Call], world: int) -> float:
        return 1e-6 * sum(self.microseconds(call, world) for call in calls)

    def microseconds(self, call: Call, world: int) -> float:
        nodes = math.ceil(world / self.node)
        launch = 0.0 if self.graph else self.launch
        if call.kind == "all_to_all":
            # Point to point has no LL on the network; empty messages are not sent.
            small = nodes == 1 and call.size <= self.low_latency
            protocol = self.ring[0] if small else self.ring[-1]
            hop = protocol.nvlink if nodes == 1 else protocol.network
            link = self.nvlink if nodes == 1 else self.nic
            launch += 0.0 if self.graph else self.peer * max(0, call.peers - 1)
            return launch + protocol.base + hop + self._transfer(call, world, protocol, link)
        # A ring enters each node through one NIC; several rings use all of them.
        link = self.nvlink if nodes == 1 else min(self.nvlink, self.node * self.nic)
        turns = 2 if call.kind == "all_reduce" else 1
        times = []
        for protocol in self.ring:
            hop = protocol.nvlink if nodes == 1 else max(protocol.nvlink, self.post)
            hops = turns * ((world - nodes) * hop + (nodes - 1) * protocol.network)
            times.append(protocol.base + hops + self._transfer(call, world, protocol, link))
        if call.kind == "all_reduce":
            inside, between = min(world, self.node) - 1, int(math.log2(nodes))
            hops = 2 * (inside * self.tree.nvlink + between * self.tree.network)
            times.append(self.tree.base + hops + self._transfer(call, world, self.tree, link))
        return launch + min(times)

    def _transfer(self, call: Call, world: int, protocol: Protocol, link: float) -> float:
        rate = min(link * protocol.share, protocol.most[world > self.node])
        return 1e6 * received(call, world) / rate


class Public(NamedTuple):
    """What somebody has measured and published.

    Attributes:
        source: a thread on GitHub.
        what: in its author's words, shortened.
        graph: whether the calls were in a CUDA graph.
        world: ranks.
        call: with its bytes.
        microseconds: of a call.
        unlike: why the model need not hold; empty if it has to.
    """

    source: str
    what: str
    graph: bool
    world: int
    call: Call
    microseconds: float
    unlike: str = ""

    @property
    def ratio(self) -> float:
        """Model over measured."""
        return NCCL(self.graph).microseconds(self.call, self.world) / self.microseconds


def _measured() -> Iterable[Public]:
    triton = "ByteDance-Seed/Triton-distributed#57", "8 H100, all_reduce of torch"
    # Launched one by one, as far as the thread says. `launch` comes from the 128 B.
    table = {128: 19.19, 2**10: 19.50, 2**14: 20.71, 2**16: 23.05, 2**20: 32.42, 2**24: 135.68}
    for size, time in table.items():
        yield Public(*triton, False, 8, Call("all_reduce", size), time)
    slow = "an outlier of that table, where twice the bytes take 59.4"
    yield Public(*triton, False, 8, Call("all_reduce", 2**21), 290.73, slow)
    later = "NVIDIA/nccl#2094", "8 H100, all_reduce, NCCL 2.29.7, 10 µs slower than 2.28"
    for size, time in {2**10: 34.57, 2**15: 33.56}.items():
        yield Public(*later, False, 8, Call("all_reduce", size), time)
    pairs = "meta-pytorch/torchcomms#2159", "H100, NCCLx, batched send and receive with one peer"
    for size, time in {2**13: 7.4, 2**16: 7.7, 2**20: 15.0, 2**25: 141.0, 2**30: 2988.0}.items():
        yield Public(*pairs, True, 2, Call("all_to_all", size, peers=1), time)
    two_nodes = "NVIDIA/nccl#1244", "2 nodes of 8 H20, InfiniBand NDR, all_reduce, NVLSTree"
    for size, time in {8: 47.60, 512: 46.58}.items():
        yield Public(*two_nodes, False, 16, Call("all_reduce", size), time)
    three_nodes = "NVIDIA/nccl#1453", "3 nodes of 8 H100, virtual machines in two racks, all_reduce"
    degraded = "a thread about a slow network, where NCCL's own model says 25.2 to 25.9, too"
    for size, time in {128: 61.58, 2**12: 75.38}.items():
        yield Public(*three_nodes, False, 24, Call("all_reduce", size), time, degraded)
    symmetric = "another path, for memory that all ranks have registered, which ours is not"
    what = "8 H200 or 8 H800, all_reduce in symmetric memory"
    yield Public("NVIDIA/nccl#1940", what, True, 8, Call("all_reduce", 8), 2.3, symmetric)


PUBLIC = tuple(_measured())
