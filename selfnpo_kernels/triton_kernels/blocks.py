"""Shared by the kernels: which elements a program handles, and terms whose zero coefficient removes their operand."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements per program: two 16-byte accesses per thread and operand in float32


def grid(tensor: Tensor) -> tuple[tuple[int], int, int]:
    """(grid, elements per sample, programs per sample): a program never spans two samples."""
    elements = tensor[0].numel()
    blocks = triton.cdiv(elements, BLOCK)
    return (len(tensor) * blocks,), elements, blocks


def value_and_pointer(value: float | int | Tensor, absent: Tensor) -> tuple[float | int, Tensor, bool]:
    """Arguments for a scalar that may be in device memory: (value, pointer, whether to use the pointer)."""
    return (0, value, True) if isinstance(value, Tensor) else (value, absent, False)


def on_its_device(launch: Callable) -> Callable:
    """Make the first tensor's GPU the current one. Triton launches on the current GPU, wherever the tensors are."""

    @wraps(launch)
    def launched(*args: Any) -> Any:
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            return launch(*args)

    return launched


@triton.jit
def locate(elements, blocks, BLOCK: tl.constexpr):
    """(sample, index of this program's first element in the batch, offsets from it, mask)."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    start = (program % blocks).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    return sample, sample * elements + start, offset, offset < elements - start


@triton.jit
def term(coefficient, value):
    return tl.where(coefficient == 0.0, 0.0, coefficient * value)
