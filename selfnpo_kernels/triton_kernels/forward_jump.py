import torch
import triton
import triton.language as tl
from torch import Tensor

from selfnpo_kernels.triton_kernels.blocks import BLOCK, grid, on_its_device, term, value_and_pointer

COUNTERS = BLOCK // 4  # per program, four elements each


@triton.jit
def log_positive(x):
    """Natural logarithm of a normal positive number, within 1 ulp; csrc/philox.h explains the steps."""
    offset = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (offset >> 23).to(tl.float32)
    f = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    tail = p * f * f2 + e * -2.12194440e-4 - 0.5 * f2
    return f + tail + e * 0.693359375


@triton.jit
def sin_cos(angle):
    """Sine and cosine of an angle in [-pi, pi]; csrc/philox.h explains the steps."""
    rounded = angle * 0.636619772 + 12582912.0
    quadrant = rounded.to(tl.int32, bitcast=True)
    j = rounded - 12582912.0
    r = ((angle - j * 1.5703125) - j * 4.83751296997e-4) - j * 7.54978995489e-8
    r2 = r * r
    s = ((-1.9515295891e-4 * r2 + 8.3321608736e-3) * r2 - 1.6666654611e-1) * r2 * r + r
    c = ((2.443315711809948e-5 * r2 - 1.388731625493765e-3) * r2 + 4.166664568298827e-2) * r2 * r2 - 0.5 * r2 + 1.0
    odd = (quadrant & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def box_muller(word0, word1):
    uniform = word0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    angle = word1.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # pi 2^-31
    radius = tl.sqrt_rn(-2.0 * log_positive(uniform))
    sine, cosine = sin_cos(angle)
    return radius * cosine, radius * sine


@triton.jit
def philox_4x32(c0, seed, step, site, sample_id):
    """Four words per counter; `c0` is a uint32 block, the rest scalars of any integer type.

    Triton's own `philox` draws the same words, but multiplies twice where one 64-bit product has both halves.
    """
    seed = tl.cast(seed, tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c1 = tl.zeros_like(c0) + tl.cast(step, tl.uint32)
    c2 = tl.zeros_like(c0) + tl.cast(site, tl.uint32)
    c3 = tl.zeros_like(c0) + tl.cast(sample_id, tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["seed", "step", "site"])  # they change in every step, but must not trigger recompilation
def forward_jump_kernel(
    out, sample, rows, row_stride, sample_ids, seed, seed_pointer, step, step_pointer, site, channels, positions, blocks,
    HAS_SAMPLE: tl.constexpr, HAS_SEED_POINTER: tl.constexpr, HAS_STEP_POINTER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = (program // blocks).to(tl.int64)
    elements = tl.cast(channels, tl.int64) * positions
    first = (program % blocks).to(tl.int64) * COUNTERS
    lane = tl.arange(0, COUNTERS)
    within = tl.arange(0, 4)
    if CHANNELS_LAST:
        lane += first.to(tl.int32)
        if WHOLE:  # neighbouring lanes take the channels of the same four positions, which are adjacent in memory
            lane = (lane % channels) * (positions // 4) + lane // channels
        counter = lane.to(tl.uint32)
        logical = lane[:, None] * 4 + within[None, :]
        mask = logical < elements
        offset = (logical % positions) * channels + logical // positions
        base = index * elements
    else:
        counter = first.to(tl.uint32) + lane.to(tl.uint32)
        offset = lane[:, None] * 4 + within[None, :]
        mask = offset < elements - first * 4
        base = index * elements + first * 4

    if HAS_SEED_POINTER:
        seed = tl.load(seed_pointer)
    if HAS_STEP_POINTER:
        step = tl.load(step_pointer)
    word0, word1, word2, word3 = philox_4x32(counter, seed, step, site, tl.load(sample_ids + index))
    normal0, normal1 = box_muller(word0, word1)
    normal2, normal3 = box_muller(word2, word3)
    z = tl.reshape(tl.join(tl.join(normal0, normal2), tl.join(normal1, normal3)), (COUNTERS, 4))
    if HAS_SAMPLE:
        a = tl.load(rows + index * row_stride)
        b = tl.load(rows + index * row_stride + 1)
        x = tl.load(sample + base + offset, mask=mask).to(tl.float32)
        z = term(a, x) + term(b, z)
    tl.store(out + base + offset, z, mask=mask)


@on_its_device
def launch(
    out: Tensor,
    sample: Tensor | None,
    rows: Tensor,
    sample_ids: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    site: int,
    channels: int,
    positions: int,
) -> None:
    if channels > 1 and channels * positions >= 2**31:  # the kernel counts the elements of such a layout in 32 bits
        row_major = torch.empty_like(out, memory_format=torch.contiguous_format)
        sample = None if sample is None else sample.contiguous()
        launch(row_major, sample, rows, sample_ids, seed, step, site, 1, channels * positions)
        out.copy_(row_major)
        return
    seed, seed_pointer, has_seed = value_and_pointer(seed, sample_ids)
    step, step_pointer, has_step = value_and_pointer(step, sample_ids)
    programs, _, blocks = grid(out)
    forward_jump_kernel[programs](
        out, out if sample is None else sample, out if sample is None else rows, rows.stride(0), sample_ids,
        seed, seed_pointer, step, step_pointer, site, channels, positions, blocks,
        HAS_SAMPLE=sample is not None, HAS_SEED_POINTER=has_seed, HAS_STEP_POINTER=has_step,
        CHANNELS_LAST=channels > 1, WHOLE=positions % 4 == 0, COUNTERS=COUNTERS,
    )  # fmt: skip
