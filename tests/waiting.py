"""What the host does not wait for."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def host_never_waits() -> Iterator[None]:
    """Let an operation raise that makes the host wait for the GPU; afterwards all is as before.

    Sync debug mode warns that it is a prototype, after it has been switched on; where warnings are
    errors, it would stay on and fail every later test.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
