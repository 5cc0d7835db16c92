"""Each op against what one writes in eager PyTorch, against the same under torch.compile, and against copying memory.

pytest benchmarks/bench_ops.py --benchmark-only
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import selfnpo_kernels as kernels
from benchmarks.measure import interleaved, quartiles, timer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"20x4x64x64": (20, 4, 64, 64), "256 MiB": (64, 4, 512, 512)}
SCALE, RESCALE, HUBER_C = 3.0, 0.7, 1e-3


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


# op -> (kernel, eager, bytes that must be moved per element of a float32 sample)
OPS = {
    "tweedie": (
        lambda i: kernels.tweedie(i.sample, i.cond, i.rows[:, :2]),
        lambda i: i.column(0) * i.sample + i.column(1) * i.cond,
        12,
    ),
    "guided_step": (lambda i: kernels.guided_step(i.sample, i.cond, i.uncond, SCALE, i.rows), eager_guided_step, 20),
    "guided_step, no uncond": (
        lambda i: kernels.guided_step(i.sample, i.cond, None, SCALE, i.rows),
        lambda i: (
            i.column(0) * i.sample + i.column(1) * i.cond,
            i.column(2) * i.sample + i.column(3) * i.cond,
        ),
        16,
    ),
    "forward_jump": (
        lambda i: kernels.forward_jump(i.sample, i.rows[:, :2], 1, 2, i.ids),
        lambda i: i.column(0) * i.sample + i.column(1) * torch.randn_like(i.sample),
        8,
    ),
    "philox_normal": (
        lambda i: kernels.philox_normal(i.sample.shape, 1, 2, 0, i.ids),
        lambda i: torch.randn_like(i.sample),
        4,
    ),
    # Half as many outputs as the batch has samples, hence half the bytes.
    "cfg_combine": (lambda i: kernels.cfg_combine(i.batched, SCALE), eager_cfg_combine, 6),
    "cfg_combine, rescaled": (lambda i: kernels.cfg_combine(i.batched, SCALE, RESCALE), eager_cfg_rescaled, 10),
    "x0_loss, huber": (
        lambda i: kernels.x0_loss(i.output, i.sample, i.cond, i.rows[:, :3], "huber", HUBER_C),
        eager_x0_loss,
        12,
    ),
    "x0_loss, huber, and gradient": (
        loss_and_gradient(lambda i: kernels.x0_loss(i.output, i.sample, i.cond, i.rows[:, :3], "huber", HUBER_C)),
        loss_and_gradient(eager_x0_loss),
        28,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPS)
def bench_op(benchmark, op, size):
    kernel, eager, moved = OPS[op]
    i = inputs(SIZES[size])
    destination = torch.empty_like(i.sample)
    torch._dynamo.reset()
    compiled = torch.compile(eager)
    arms = {
        "kernel": lambda: kernel(i),
        "eager": lambda: eager(i),
        "compile": lambda: compiled(i),
        "copy": lambda: destination.copy_(i.sample),
    }
    report(benchmark, op, size, arms, moved * i.sample.numel(), 2 * i.sample.nbytes)


@pytest.mark.parametrize("size", SIZES)
def bench_optimizer(benchmark, size):
    """Clipping, AdamW and the moving average: float32 weights and gradients."""
    numel = inputs(SIZES[size]).sample.numel()
    params, grads, ema, first, second = (torch.rand(16, numel // 16, device=DEVICE) for _ in range(5))
    ours = [list(tensor.unbind()) for tensor in (params, grads, first, second)]
    ours_ema = list(ema.unbind())
    theirs, average = ([torch.nn.Parameter(tensor.clone()) for tensor in params] for _ in range(2))
    for param, grad in zip(theirs, grads, strict=True):
        param.grad = grad.clone()
    optimizer = torch.optim.AdamW(theirs, lr=1e-4, fused=True)
    step, lr = torch.tensor(1, device=DEVICE), torch.tensor(1e-4, device=DEVICE)

    def kernel():
        scale = (1.0 / (torch.nn.utils.get_total_norm(ours[1]) + 1e-6)).clamp(max=1.0)
        kernels.fused_adamw_(*ours, step=step, lr=lr, grad_scale=scale, emas=ours_ema)

    @torch.no_grad()
    def eager():
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, theirs, 1e-3)

    destination = torch.empty_like(params)
    arms = {"kernel": kernel, "eager": eager, "copy": lambda: destination.copy_(params)}
    report(benchmark, "fused_adamw_, clip, average", size, arms, 40 * numel, 2 * params.nbytes)


def report(benchmark, op, size, arms, op_bytes, copy_bytes):
    """Interleaved rounds of all arms; pytest-benchmark keeps the kernel's own, `extra_info` the rest."""
    rounds = 50 if op_bytes < 1e8 else 15
    timers = {name: timer(function, DEVICE) for name, function in arms.items()}
    seconds = interleaved(timers, rounds)
    middle = {name: quartiles(values)[1] for name, values in seconds.items()}
    bandwidth, copy_bandwidth = op_bytes / middle["kernel"], copy_bytes / middle["copy"]
    benchmark.extra_info["seconds"] = {name: quartiles(values) for name, values in seconds.items()}
    benchmark.extra_info["bytes"] = op_bytes
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth

    def column(name: str, form: str, scale: float) -> str:
        return form.format(middle[name] * scale) if name in middle else ""

    ratio = 1 / middle["kernel"]
    benchmark.extra_info["row"] = (
        op, size, *(column(name, "{:.3g}", 1e3) for name in ("kernel", "eager", "compile")),
        *(column(name, "{:.1f}", ratio) for name in ("eager", "compile")), f"{bandwidth / 1e9:.1f}",
        f"{bandwidth / copy_bandwidth:.0%}",
    )  # fmt: skip
    benchmark.group = size
    benchmark.pedantic(timers["kernel"], rounds=rounds)
