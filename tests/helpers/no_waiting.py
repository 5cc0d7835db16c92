"""For tests on a GPU."""

from contextlib import contextmanager

import torch


@contextmanager
def no_waiting():
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
