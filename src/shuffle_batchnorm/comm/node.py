"""The ranks of one node as a process group."""

import os
import socket
from weakref import WeakKeyDictionary

import torch.distributed as dist

from . import agreement
from .world import World, resolve

CALL = "node_group"
Nodes = tuple[tuple[int, ...], ...]  # the ranks of each node

# By the group of all ranks, then by `ranks_per_node` and by nodes: torch keeps every group that it
# has made, and one of NCCL's takes memory on the GPU. None stands for the group of all ranks.
_groups: "WeakKeyDictionary[dist.ProcessGroup, dict[int | Nodes | None, dist.ProcessGroup | None]]"
_groups = WeakKeyDictionary()


def node_group(ranks_per_node: int | None = None) -> "dist.ProcessGroup | None":
    """Return the process group of the ranks on this rank's node, for messages that stay inside it.

    A layer in it shuffles among ``G = W * groups`` groups, where W is now the number of ranks on
    the node. In `regroup` a sample shares ``1 / B`` of its group with its normaliser,
    ``B = min(G, blocks)``, whatever W is: with 8 ranks on a node, or with virtual groups that make
    G at least ``blocks``, a node mixes as much as all nodes together. What is lost: statistics say
    on which node a sample was, and `batch_shuffle`, which leaves ``1 / W`` of the batch's other
    samples around a sample, leaves more of them. ``docs/scale.md`` has the numbers.

    Communication:
        Once for each `ranks_per_node`, among all ranks: an all_gather of 2 KiB per rank, then torch
        makes the groups. Later calls return the same group and send nothing.

    Args:
        ranks_per_node: ranks 0 to ``ranks_per_node - 1`` are the first node, and so on. None finds
            out which ranks are on the same host, and under ``torchrun`` were started by the same
            agent; nodes may then differ in size. Pass it where NVLink reaches beyond a host.

    Returns:
        The group, for any `process_group` of this library. All ranks' own group if there is one
        node; None before ``init_process_group``, where a process is alone. The group has torch's
        default time limit.

    Raises:
        TypeError: `ranks_per_node` is no int.
        ValueError: on every rank, if it is below 1 or does not divide the number of ranks, or if
            ranks disagree on it.
        RuntimeError: on the peers of a rank that raises one of these alone.

    Example:
        Every rank calls it, after ``init_process_group`` and ``torch.cuda.set_device``:

        >>> import torch
        >>> from shuffle_batchnorm import ShuffleBatchNorm, node_group
        >>> encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> encoder = ShuffleBatchNorm.convert_shuffle_batchnorm(
        ...     encoder, node_group(), mode="regroup", groups=8
        ... )
        >>> encoder(torch.randn(16, 3, 5, 5)).shape
        torch.Size([16, 8, 3, 3])
    """
    world = resolve(None, CALL)
    error = _find_error(ranks_per_node, world)
    if world.group is None:
        if error is not None:
            raise error
        return None
    groups = _groups.setdefault(world.group, {})
    if error is not None or ranks_per_node not in groups:
        terms = {"ranks_per_node": ranks_per_node}
        hosts = agreement.agree(CALL, terms, error, world, own=_host())
        nodes = _find_nodes(ranks_per_node, hosts)
        if nodes not in groups:
            made = None
            if len(nodes) > 1:
                made, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in nodes])
            groups[nodes] = made
        groups[ranks_per_node] = groups[nodes]
    group = groups[ranks_per_node]
    return world.group if group is None else group


def _find_error(ranks_per_node: int | None, world: World) -> Exception | None:
    if ranks_per_node is None:
        return None
    if not isinstance(ranks_per_node, int) or isinstance(ranks_per_node, bool):
        return TypeError(f"{CALL}: ranks_per_node must be an int or None, got {ranks_per_node!r}")
    if ranks_per_node < 1:
        return ValueError(
            f"{CALL}: ranks_per_node must be at least 1, got ranks_per_node={ranks_per_node}"
        )
    if world.group is not None and world.size % ranks_per_node:
        return ValueError(
            f"{CALL}: {world.size} ranks are not divisible by ranks_per_node={ranks_per_node}; "
            "without it, nodes may differ in size"
        )
    return None


def _host() -> str:
    """Name this rank's node: torchrun numbers its agents, and hosts may have the same name."""
    return f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}"


def _find_nodes(ranks_per_node: int | None, hosts: list[str]) -> Nodes:
    """Return the ranks of each node, in order: consecutive ones, or those with the same host."""
    keys = hosts if ranks_per_node is None else [r // ranks_per_node for r in range(len(hosts))]
    nodes: dict[object, list[int]] = {}
    for rank, key in enumerate(keys):
        nodes.setdefault(key, []).append(rank)
    return tuple(tuple(ranks) for ranks in nodes.values())
