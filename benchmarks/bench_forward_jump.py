"""x_s = a x_t + b z: the compiled kernel, the specification, and what one would write in PyTorch.

pytest benchmarks --benchmark-only
"""

import pytest
import torch

from selfnpo_kernels import forward_jump, reference

SHAPES = {"training 20x4x64x64": (20, 4, 64, 64), "64 MiB": (64, 4, 256, 256)}


def eager(sample, rows, *_):
    a, b = rows[:, :, None, None, None].unbind(1)
    return a * sample + b * torch.randn_like(sample)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("function", [forward_jump, eager, reference.forward_jump], ids=["kernel", "eager", "reference"])
def bench_forward_jump(benchmark, function, shape):
    if function is reference.forward_jump and shape[0] > 20:
        pytest.skip("the specification takes seconds here and is not meant to be fast")
    benchmark.group = str(shape)
    benchmark(function, torch.randn(shape), torch.rand(shape[0], 2), 1, 2, torch.arange(shape[0]), 3)
