import triton
import triton.language as tl
from torch import Tensor

from selfnpo_kernels.triton_kernels.blocks import BLOCK, grid, locate, on_its_device, term, value_and_pointer


@triton.jit
def guided_step_kernel(
    prev_sample, pred_original_sample, sample, cond, uncond, rows, row_stride, scale, scale_pointer, elements, blocks,
    HAS_PREV: tl.constexpr, HAS_UNCOND: tl.constexpr, HAS_SCALE_POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, base, offset, mask = locate(elements, blocks, BLOCK)
    row = rows + index * row_stride
    x = tl.load(sample + base + offset, mask=mask).to(tl.float32)
    m = tl.load(cond + base + offset, mask=mask).to(tl.float32)
    if HAS_UNCOND:
        if HAS_SCALE_POINTER:
            scale = tl.load(scale_pointer)
        u = tl.load(uncond + base + offset, mask=mask).to(tl.float32)
        m = u + scale * (m - u)
    x0 = term(tl.load(row), x) + term(tl.load(row + 1), m)
    tl.store(pred_original_sample + base + offset, x0, mask=mask)
    if HAS_PREV:
        prev = term(tl.load(row + 2), x) + term(tl.load(row + 3), m)
        tl.store(prev_sample + base + offset, prev, mask=mask)


@on_its_device
def launch(
    prev_sample: Tensor | None,
    pred_original_sample: Tensor,
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    rows: Tensor,
    scale: float | Tensor,
) -> None:
    scale, scale_pointer, has_pointer = value_and_pointer(scale, rows)
    programs, elements, blocks = grid(sample)
    guided_step_kernel[programs](
        sample if prev_sample is None else prev_sample, pred_original_sample, sample, cond,
        cond if uncond is None else uncond, rows, rows.stride(0), float(scale), scale_pointer, elements, blocks,
        HAS_PREV=prev_sample is not None, HAS_UNCOND=uncond is not None, HAS_SCALE_POINTER=has_pointer, BLOCK=BLOCK,
    )  # fmt: skip
