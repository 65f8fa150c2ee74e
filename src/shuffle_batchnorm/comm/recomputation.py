"""Whether a forward pass is run again inside a backward pass."""

import torch


def is_recomputation() -> bool:
    """Whether an activation checkpoint runs this forward again, inside a backward pass."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
