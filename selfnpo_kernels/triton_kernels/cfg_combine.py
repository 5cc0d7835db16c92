import torch
import triton
import triton.language as tl
from torch import Tensor

from selfnpo_kernels.triton_kernels.blocks import BLOCK, grid, locate, on_its_device, value_and_pointer

SEGMENTS = 256  # at most this many per sample; one program adds up their partial moments


@triton.jit
def guided(negative, positive, scale, at, mask):
    n = tl.load(negative + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(positive + at, mask=mask, other=0.0).to(tl.float32)
    return n + scale * (p - n), p


@triton.jit
def moments_kernel(
    moments, negative, positive, scale, scale_pointer, elements, segments, segment_blocks,
    HAS_SCALE_POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per segment: sums of deviations from the sample's first element and of their squares, for positive and guided."""
    program = tl.program_id(0)
    if HAS_SCALE_POINTER:
        scale = tl.load(scale_pointer)
    base = (program // segments).to(tl.int64) * elements
    first = (program % segments).to(tl.int64) * segment_blocks * BLOCK
    pivot_guided, pivot_positive = guided(negative, positive, scale, base, True)
    p1 = tl.zeros((BLOCK,), tl.float32)
    p2 = tl.zeros((BLOCK,), tl.float32)
    g1 = tl.zeros((BLOCK,), tl.float32)
    g2 = tl.zeros((BLOCK,), tl.float32)
    for block in range(segment_blocks):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        mask = at < elements
        g, p = guided(negative, positive, scale, base + at, mask)
        p = tl.where(mask, p - pivot_positive, 0.0)
        g = tl.where(mask, g - pivot_guided, 0.0)
        p1 += p
        p2 += p * p
        g1 += g
        g2 += g * g
    out = moments + program * 4
    tl.store(out, tl.sum(p1))
    tl.store(out + 1, tl.sum(p2))
    tl.store(out + 2, tl.sum(g1))
    tl.store(out + 3, tl.sum(g2))


@triton.jit
def cfg_combine_kernel(
    out, negative, positive, moments, scale, scale_pointer, rescale, elements, blocks, segments,
    HAS_SCALE_POINTER: tl.constexpr, RESCALE: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, base, offset, mask = locate(elements, blocks, BLOCK)
    if HAS_SCALE_POINTER:
        scale = tl.load(scale_pointer)
    g, _ = guided(negative, positive, scale, base + offset, mask)
    if RESCALE:
        segment = tl.arange(0, SEGMENTS)
        part = moments + (index * segments + segment) * 4
        valid = segment < segments
        count = tl.cast(elements, tl.float32)
        p1, p2 = tl.sum(tl.load(part, mask=valid, other=0.0)), tl.sum(tl.load(part + 1, mask=valid, other=0.0))
        g1, g2 = tl.sum(tl.load(part + 2, mask=valid, other=0.0)), tl.sum(tl.load(part + 3, mask=valid, other=0.0))
        ratio = tl.sqrt_rn(tl.div_rn(p2 - p1 * p1 / count, g2 - g1 * g1 / count))
        g *= rescale * ratio + (1.0 - rescale)
    tl.store(out + base + offset, g, mask=mask)


@on_its_device
def launch(out: Tensor, model_output: Tensor, scale: float | Tensor, rescale: float) -> None:
    """One launch, or two with rescaling, because then every element depends on all elements of its sample."""
    scale, scale_pointer, has_pointer = value_and_pointer(scale, out)
    negative, positive = model_output.chunk(2)
    programs, elements, blocks = grid(out)
    segment_blocks = triton.cdiv(blocks, SEGMENTS)
    segments = triton.cdiv(blocks, segment_blocks)
    moments = out
    if rescale:
        moments = torch.empty(len(out) * segments * 4, device=out.device)
        moments_kernel[(len(out) * segments,)](
            moments, negative, positive, float(scale), scale_pointer, elements, segments, segment_blocks,
            HAS_SCALE_POINTER=has_pointer, BLOCK=BLOCK,
        )  # fmt: skip
    cfg_combine_kernel[programs](
        out, negative, positive, moments, float(scale), scale_pointer, float(rescale), elements, blocks, segments,
        HAS_SCALE_POINTER=has_pointer, RESCALE=bool(rescale), SEGMENTS=triton.next_power_of_2(segments), BLOCK=BLOCK,
    )  # fmt: skip
