"""Inputs for every op, and the one table of tolerances."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import selfnpo_kernels
from selfnpo_kernels import reference, split_weights

SHAPES = [(3, 4, 5, 6), (2, 4, 16, 32), (2, 3, 3, 5, 7), (5, 1025), (7,), (1, 1), (0, 4, 8, 8), (3, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERANDS = ("sample", "cond", "uncond", "target", "batched")
SEED, STEP, SITE = 2**63 + 5, 2**31 + 7, 3
SCALE = 2.5


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[tensor.ndim])


def inputs(shape, dtype=torch.float32, device="cpu", layout: Callable[[Tensor], Tensor] = lambda tensor: tensor):
    """Random operands of all ops; the first row is a finished one, (1, 0), the second one has a zero for the sample."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
    rows = torch.randn(shape[0], 4, generator=generator)
    rows[:1] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    rows[1:2, 0] = 0
    sample, cond, uncond, target = (layout(tensor.to(dtype).to(device)) for tensor in tensors)
    ids = torch.arange(shape[0]) * 1_000_003 + 2**33
    return SimpleNamespace(
        sample=sample, cond=cond, uncond=uncond, target=target, rows=rows.to(device), ids=ids.to(device),
        batched=layout(torch.cat((uncond, cond))), scale=torch.tensor(SCALE, device=device),
        seed=torch.tensor(SEED - 2**64, device=device), step=torch.tensor(STEP, device=device),
    )  # fmt: skip


LAYOUTS = pytest.mark.parametrize("layout", [lambda tensor: tensor, channels_last], ids=["row-major", "channels-last"])


def in_double(t):
    """The same numbers in float64, which the reference computes exactly."""
    return SimpleNamespace(**(vars(t) | {name: getattr(t, name).double() for name in OPERANDS}))


def _loss_gradients(lib, t, kind):
    operands = [tensor.detach().requires_grad_() for tensor in (t.cond, t.sample, t.target)]
    lib.x0_loss(*operands, t.rows[:, :3], kind, 0.1).backward()
    return [operand.grad for operand in operands]


# name -> (the specification or the public package, inputs) -> outputs
OPS = {
    "tweedie": lambda lib, t: [lib.tweedie(t.sample, t.cond, t.rows[:, :2])],
    "guided_step": lambda lib, t: lib.guided_step(t.sample, t.cond, t.uncond, SCALE, t.rows),
    "guided_step, scale on device": lambda lib, t: lib.guided_step(t.sample, t.cond, t.uncond, t.scale, t.rows),
    "guided_step, no uncond": lambda lib, t: lib.guided_step(t.sample, t.cond, None, SCALE, t.rows),
    "forward_jump": lambda lib, t: [lib.forward_jump(t.sample, t.rows[:, 2:], SEED, STEP, t.ids, SITE)],
    "forward_jump, seed and step on device": lambda lib, t: [
        lib.forward_jump(t.sample, t.rows[:, 2:], t.seed, t.step, t.ids, SITE)
    ],
    "cfg_combine": lambda lib, t: [lib.cfg_combine(t.batched, SCALE)],
    "cfg_combine, scale on device": lambda lib, t: [lib.cfg_combine(t.batched, t.scale)],
    "cfg_combine, rescaled": lambda lib, t: [lib.cfg_combine(t.batched, SCALE, 0.7)],
    "cfg_combine, rescaled, scale on device": lambda lib, t: [lib.cfg_combine(t.batched, t.scale, 0.7)],
    "x0_loss, l2": lambda lib, t: [lib.x0_loss(t.cond, t.sample, t.target, t.rows[:, :3])],
    "x0_loss, huber": lambda lib, t: [lib.x0_loss(t.cond, t.sample, t.target, t.rows[:, :3], "huber", 0.1)],
    "gradient, l2": lambda lib, t: _loss_gradients(lib, t, "l2"),
    "gradient, huber": lambda lib, t: _loss_gradients(lib, t, "huber"),
}


def check(op: str, t: SimpleNamespace, rounds_down: bool = False):
    """The results of an op, which are as accurate as those of the specification in the same precision."""
    results, eager, exact = OPS[op](selfnpo_kernels, t), OPS[op](reference, t), OPS[op](reference, in_double(t))
    for triple in zip(results, eager, exact, strict=True):
        assert_accurate(*triple, rounds_down)
    return results


def assert_accurate(result: Tensor, eager: Tensor, exact: Tensor, rounds_down: bool = False) -> None:
    """The tolerance of every op: at most twice the error of eager PyTorch in the same precision, or one rounding.

    Eager may hit a single number, such as a loss, by chance: that may be four roundings off.
    `rounds_down`: the backend cuts bfloat16 off instead of rounding it, which is one rounding more (conftest.Place).
    """
    assert result.dtype == eager.dtype
    assert result.shape == exact.shape
    if not result.numel():
        return
    assert result.isnan().equal(exact.isnan())
    roundings = 4 if result.ndim == 0 else 2 if rounds_down and result.dtype == torch.bfloat16 else 1
    rounding = torch.finfo(result.dtype).eps / 2 * exact.nan_to_num().abs().max()
    result, eager, exact = (tensor.double().nan_to_num() for tensor in (result, eager, exact))
    error, eager_error = (result - exact).abs().max(), (eager - exact).abs().max()
    assert error <= max(2 * eager_error, roundings * rounding), (error, eager_error, rounding)


def agree(noise, exact):
    """To 5e-7, or 2^-22 of numbers beyond 2, where float32 itself is no finer."""
    return ((noise - exact).abs() <= 5e-7 * (exact.abs() / 2).clamp(min=1)).all()


ADAMW_SIZES = [1, 0, 3, 4, 4095, 4096, 4097, 9000, *[5] * 500]  # blocks, tails, and more tensors than one launch takes


def adamw_lists(dtype: torch.dtype, split: bool, average: bool = True, device: str = "cpu") -> dict[str, list[Tensor]]:
    """What `fused_adamw_` takes, with gradients of `dtype`; some of it is not aligned."""
    generator = torch.Generator().manual_seed(0)

    def draw(make=torch.randn, dtype=torch.float32):
        return [make(size, generator=generator).to(dtype).to(device) for size in ADAMW_SIZES]

    lists = {"params": draw(), "grads": draw(dtype=dtype), "exp_avgs": draw(), "exp_avg_sqs": draw(torch.rand)}
    for name, k in (("grads", 4), ("params", 5), ("exp_avgs", 6)):
        lists[name][k] = torch.cat((lists[name][k][:1], lists[name][k]))[1:]
    if average:
        lists["emas"] = draw()
    for name, low in (("params", "lows"), ("emas", "ema_lows")):
        if split and name in lists:
            lists[name], lists[low] = map(list, zip(*map(split_weights, lists[name]), strict=True))
    return lists
