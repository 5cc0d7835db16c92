"""Each op against plain eager PyTorch, against the same code under torch.compile, and against copying memory.

pytest benchmarks/bench_ops.py --benchmark-only
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import selfnpo_kernels as kernels
from benchmarks import heap
from benchmarks.measure import Failures, in_turns, timers
from benchmarks.workloads import DEVICE

LARGE, IMAGES = ("256 MiB", 64) if DEVICE.type == "cuda" else ("128 MiB", 32)
SIZES = {"20x4x64x64": (20, 4, 64, 64), LARGE: (IMAGES, 4, 512, 512)}
SCALE, RESCALE, HUBER_C = 3.0, 0.7, 1e-3
EFFICIENCY = 0.85  # share of a copy's bandwidth that predictions assume
BUDGET = 0.5 if DEVICE.type == "cuda" else 2  # seconds per op and size


@dataclass
class Inputs:
    sample: Tensor
    cond: Tensor
    uncond: Tensor
    batched: Tensor  # [2 B, ...]
    output: Tensor  # requires a gradient
    rows: Tensor  # [B, 4]
    ids: Tensor

    def column(self, k: int) -> Tensor:
        return self.rows[:, k, None, None, None]


def inputs(shape) -> Inputs:
    torch.manual_seed(0)
    sample, cond, uncond, output = (torch.randn(shape, device=DEVICE) for _ in range(4))
    rows, ids = torch.rand(shape[0], 4, device=DEVICE) + 0.1, torch.arange(shape[0], device=DEVICE)
    return Inputs(sample, cond, uncond, torch.randn(shape[0] // 2 * 2, *shape[1:], device=DEVICE), output, rows, ids)


def eager_guided_step(i: Inputs):
    m = i.uncond + SCALE * (i.cond - i.uncond)
    return i.column(0) * i.sample + i.column(1) * m, i.column(2) * i.sample + i.column(3) * m


def eager_cfg_combine(i: Inputs):
    negative, positive = i.batched.chunk(2)
    return negative + SCALE * (positive - negative)


def eager_cfg_rescaled(i: Inputs):
    guided, positive = eager_cfg_combine(i), i.batched.chunk(2)[1]
    rescaled = guided * (positive.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True))
    return RESCALE * rescaled + (1 - RESCALE) * guided


def eager_x0_loss(i: Inputs):
    difference = i.column(0) * i.sample + i.column(1) * i.output - i.column(2) * i.cond
    return (torch.sqrt(difference.square() + HUBER_C**2) - HUBER_C).mean()


def loss_and_gradient(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    def run(i: Inputs) -> Tensor:
        i.output.requires_grad_()
        return torch.autograd.grad(loss(i), i.output)[0]

    return run


# op -> (kernel, eager, bytes that must be moved and operations per element of a float32 sample). A normal number counts as
# 45 operations: Philox makes four words in 10 rounds of 10, and Box-Muller makes two normals in about 40.
OPS = {
    "tweedie": (
        lambda i: kernels.tweedie(i.sample, i.cond, i.rows[:, :2]),
        lambda i: i.column(0) * i.sample + i.column(1) * i.cond,
        12, 3,
    ),
    "guided_step": (lambda i: kernels.guided_step(i.sample, i.cond, i.uncond, SCALE, i.rows), eager_guided_step, 20, 9),
    "guided_step, no uncond": (
        lambda i: kernels.guided_step(i.sample, i.cond, None, SCALE, i.rows),
        lambda i: (
            i.column(0) * i.sample + i.column(1) * i.cond,
            i.column(2) * i.sample + i.column(3) * i.cond,
        ),
        16, 6,
    ),
    "forward_jump": (
        lambda i: kernels.forward_jump(i.sample, i.rows[:, :2], 1, 2, i.ids),
        lambda i: i.column(0) * i.sample + i.column(1) * torch.randn_like(i.sample),
        8, 48,
    ),
    "philox_normal": (
        lambda i: kernels.philox_normal(i.sample.shape, 1, 2, 0, i.ids),
        lambda i: torch.randn_like(i.sample),
        4, 45,
    ),
    # The output has half as many samples as the batch, hence half the bytes.
    "cfg_combine": (lambda i: kernels.cfg_combine(i.batched, SCALE), eager_cfg_combine, 6, 1.5),
    "cfg_combine, rescaled": (lambda i: kernels.cfg_combine(i.batched, SCALE, RESCALE), eager_cfg_rescaled, 10, 5),
    "x0_loss, huber": (
        lambda i: kernels.x0_loss(i.output, i.sample, i.cond, i.rows[:, :3], "huber", HUBER_C),
        eager_x0_loss,
        12, 10,
    ),
    "x0_loss, huber, and gradient": (
        loss_and_gradient(lambda i: kernels.x0_loss(i.output, i.sample, i.cond, i.rows[:, :3], "huber", HUBER_C)),
        loss_and_gradient(eager_x0_loss),
        28, 20,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _memory(size):
    if size == LARGE and DEVICE.type == "cpu":
        heap.touch()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPS)
def bench_op(record, op, size):
    kernel, eager, moved, operations = OPS[op]
    i = inputs(SIZES[size])
    destination = torch.empty_like(i.sample)
    torch._dynamo.reset()
    compiled = torch.compile(eager)
    arms = {
        "eager": lambda: eager(i),
        "compile": lambda: compiled(i),
        "copy": lambda: destination.copy_(i.sample),
        "kernel": lambda: kernel(i),
    }
    numel = i.sample.numel()
    report(record, op, size, arms, moved * numel, operations * numel, 2 * i.sample.nbytes)


@pytest.mark.parametrize("size", SIZES)
def bench_optimizer(record, size):
    """Clipping, AdamW and the moving average: float32 weights and gradients."""
    numel = inputs(SIZES[size]).sample.numel()
    params, grads, ema, first, second = (torch.rand(16, numel // 16, device=DEVICE) for _ in range(5))
    ours = [list(tensor.unbind()) for tensor in (params, grads, first, second)]
    ours_ema = list(ema.unbind())
    theirs, average = ([torch.nn.Parameter(tensor.clone()) for tensor in params] for _ in range(2))
    for param, grad in zip(theirs, grads, strict=True):
        param.grad = grad.clone()
    optimizer = torch.optim.AdamW(theirs, lr=1e-4, fused=True, capturable=DEVICE.type == "cuda")
    step, lr = torch.ones((), dtype=torch.int64, device=DEVICE), torch.full((), 1e-4, device=DEVICE)

    def kernel():
        scale = (1.0 / (torch.nn.utils.get_total_norm(ours[1]) + 1e-6)).clamp(max=1.0)
        kernels.fused_adamw_(*ours, step=step, lr=lr, grad_scale=scale, emas=ours_ema)

    @torch.no_grad()
    def eager():
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, theirs, 1e-3)

    destination = torch.empty_like(params)
    arms = {"eager": eager, "copy": lambda: destination.copy_(params), "kernel": kernel}
    report(record, "fused_adamw_, clip, average", size, arms, 40 * numel, 20 * numel, 2 * params.nbytes)


def report(record, op, size, arms, op_bytes, operations, copy_bytes):
    """Time all arms in turns and record a row. A row needs at least the kernel and the copy."""
    failures = Failures()
    found = timers(arms, DEVICE, failures)
    if not {"kernel", "copy"} <= found.keys():
        failures.finish()
    times = in_turns(found, BUDGET)
    seconds, copied = times.median("kernel"), copy_bytes / times.median("copy")
    expected = op_bytes / (EFFICIENCY * copied)
    row = {f"{name}, ms": times.ms(name) for name in arms} | {
        "op": op,
        "size": size,
        "eager, x": times.ratio("eager", "kernel"),
        "compile, x": times.ratio("compile", "kernel"),
        "bandwidth, GB/s": op_bytes / seconds / 1e9,
        "of copy, %": 100 * op_bytes / seconds / copied,
        "intensity, op/B": operations / op_bytes,
        "predicted kernel, ms": 1e3 * expected,
        "error of that, %": 100 * (expected / seconds - 1),
        "noise, %": 100 * times.noise,
    }
    record("ops", [row], {"copy B/s": copied})
    failures.finish()
