"""The truth that every test compares with: batch norm by the definition, on one process.

Nothing here uses the library. The samples of all ranks are a list of groups in their global order;
who normalises whom is spelt out with sets of samples, and gradients are autograd's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truth:
    """What plain torch makes of the groups of all ranks.

    Attributes:
        outputs: the normalised groups.
        own: per group, mean and biased variance ``[2, C]`` of its own samples.
        used: per group, its blocks' ``(samples, values, mean and biased variance [2, C])``.
    """

    outputs: list[Tensor]
    own: list[Tensor]
    used: list[list[tuple[int, int, Tensor]]]


def shuffled(
    groups: Sequence[Tensor],
    mode: str,
    offset: int = 1,
    blocks: int = 8,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Truth:
    """Normalise the groups ``[n, C, *]`` of all ranks as the mode says, differentiably."""
    total = len(groups)
    pieces = min(total, blocks) if mode == "regroup" else 1
    cut = [list(torch.tensor_split(group, pieces)) for group in groups]
    members: dict[int, list[Tensor]] = {}
    user: list[list[int]] = []
    for i, parts in enumerate(cut):
        user.append([])
        for c, part in enumerate(parts):
            joins = {"local": i, "swap": i, "sync": 0, "regroup": (i + offset * c) % total}[mode]
            members.setdefault(joins, []).append(part)
            user[i].append((i + offset) % total if mode == "swap" else joins)
    statistics = {s: torch.cat(parts) for s, parts in members.items()}
    outputs, used = [], []
    for i, parts in enumerate(cut):
        done, rows = [], []
        for part, s in zip(parts, user[i], strict=True):
            pool = statistics[s]
            mean_var = moments(pool)
            done.append(affine(part, mean_var, weight, bias, eps))
            rows.append((len(part), pool[:, 0].numel(), mean_var.detach()))
        outputs.append(torch.cat(done))
        used.append(rows)
    return Truth(outputs, [moments(group).detach() for group in groups], used)


def moments(x: Tensor) -> Tensor:
    """Mean and biased variance ``[2, C]`` of ``[n, C, *]``."""
    flat = x.movedim(1, 0).flatten(1)
    mean = flat.mean(dim=1)
    return torch.stack([mean, (flat - mean[:, None]).square().mean(dim=1)])


def affine(
    x: Tensor, mean_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (x - mean_var[0].view(shape)) / (mean_var[1] + eps).sqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def gradient(leaf: Tensor) -> Tensor:
    """The gradient of a leaf, which has one."""
    if leaf.grad is None:
        raise AssertionError("no gradient arrived")
    return leaf.grad


def running(
    truth: Truth, groups_of_rank: Sequence[int], momentum: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Running mean and variance of one rank after one call from 0 and 1."""
    rows = [row for i in groups_of_rank for row in truth.used[i] if row[0] > 0]
    mean = torch.stack([m[0] for _, _, m in rows]).mean(dim=0)
    var = torch.stack([m[1] * n / (n - 1) for _, n, m in rows]).mean(dim=0)
    return momentum * mean, (1 - momentum) + momentum * var
