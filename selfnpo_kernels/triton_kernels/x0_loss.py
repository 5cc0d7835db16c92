import torch
import triton
import triton.language as tl
from torch import Tensor

from selfnpo_kernels.triton_kernels.blocks import BLOCK, grid, locate, on_its_device, term


@triton.jit
def difference(sample, model_output, target, row, at, mask):
    x = tl.load(sample + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(model_output + at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(target + at, mask=mask, other=0.0).to(tl.float32)
    return term(tl.load(row), x) + term(tl.load(row + 1), m) - term(tl.load(row + 2), t)


@triton.jit
def x0_loss_kernel(
    partials, sample, model_output, target, rows, row_stride, elements, blocks, huber_c, inverse_count,
    HUBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, base, offset, mask = locate(elements, blocks, BLOCK)
    d = difference(sample, model_output, target, rows + index * row_stride, base + offset, mask)
    loss = d * d
    if HUBER:  # sqrt(d^2 + c^2) - c without its cancellation
        loss = tl.div_rn(loss, tl.sqrt_rn(loss + huber_c * huber_c) + huber_c)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(mask, loss, 0.0)) * inverse_count)


@triton.jit
def x0_loss_backward_kernel(
    out, grad, sample, model_output, target, rows, row_stride, elements, blocks, huber_c, inverse_count,
    HUBER: tl.constexpr, OPERAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, base, offset, mask = locate(elements, blocks, BLOCK)
    row = rows + index * row_stride
    d = difference(sample, model_output, target, row, base + offset, mask)
    slope = tl.div_rn(d, tl.sqrt_rn(d * d + huber_c * huber_c)) if HUBER else 2.0 * d
    slope *= tl.load(grad).to(tl.float32) * inverse_count
    coefficient = tl.load(row + OPERAND)
    if OPERAND == 2:
        coefficient = -coefficient
    tl.store(out + base + offset, term(coefficient, slope), mask=mask)


@on_its_device
def launch(sample: Tensor, model_output: Tensor, target: Tensor, rows: Tensor, kind: str, huber_c: float) -> Tensor:
    """One pass over the operands, then a sum of one number per program. No atomics, so results are bit-identical."""
    programs, elements, blocks = grid(sample)
    partials = torch.empty(programs, device=sample.device)
    x0_loss_kernel[programs](
        partials, sample, model_output, target, rows, rows.stride(0), elements, blocks, huber_c, 1 / sample.numel(),
        HUBER=kind == "huber", BLOCK=BLOCK,
    )  # fmt: skip
    return partials.sum()


@on_its_device
def launch_backward(
    out: Tensor,
    grad: Tensor,
    sample: Tensor,
    model_output: Tensor,
    target: Tensor,
    rows: Tensor,
    kind: str,
    huber_c: float,
    operand: int,
) -> None:
    programs, elements, blocks = grid(sample)
    x0_loss_backward_kernel[programs](
        out, grad, sample, model_output, target, rows, rows.stride(0), elements, blocks, huber_c, 1 / sample.numel(),
        HUBER=kind == "huber", OPERAND=operand, BLOCK=BLOCK,
    )  # fmt: skip
