"""Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of where it is used, never of how the work was split:

    counter = (element // 4, step, site, sample_id)     key = (low, high) half of the 64-bit seed

`element` is the logical row-major (NCHW) index inside one sample. Each counter yields four 32-bit integers, hence the
four elements 4q .. 4q + 3. This file is the specification; csrc/philox.h computes the same integers bit for bit.
"""

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox_4x32(counter: Tensor, seed: int) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 `[..., 4]`, each entry an unsigned 32-bit word.
        seed: 64-bit key.

    Returns:
        int64 `[..., 4]` holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        # The 64-bit products wrap as signed integers; masking after the shift recovers the unsigned high word.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK) ^ c1 ^ k0,
            product1 & MASK,
            ((product0 >> 32) & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _words(blocks: int, seed: int, step: int, site: int, sample_ids: Tensor) -> Tensor:
    """Integers of the first `blocks` counters of every sample: int64 `[B, blocks, 4]`."""
    ids = sample_ids.to(torch.int64)[:, None].expand(-1, blocks) & MASK
    block = torch.arange(blocks, device=ids.device).expand_as(ids)
    counter = torch.stack((block, torch.full_like(ids, step & MASK), torch.full_like(ids, site & MASK), ids), dim=-1)
    return philox_4x32(counter, seed)


def philox_uniform(seed: int, step: int, site: int, sample_ids: Tensor) -> Tensor:
    """One uniform number in [0, 1) per sample id, exact in float64: `[B]`."""
    return _words(1, seed, step, site, sample_ids)[:, 0, 0].double() * 2.0**-32


def philox_normal(
    shape: tuple[int, ...], seed: int, step: int, site: int, sample_ids: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise of `shape` = `[B, ...]` by Box-Muller, on the device of `sample_ids` (`[B]`, integer).

    Radius and angle are rounded to float32 in every precision, so that a float64 result is the same noise, only with
    exact logarithms and cosines.
    """
    if len(shape) == 0 or sample_ids.shape != (shape[0],):
        raise ValueError(f"sample_ids must hold one id per sample: got {tuple(sample_ids.shape)} for shape {shape}")
    elements = math.prod(shape[1:])
    words = _words((elements + 3) // 4, seed, step, site, sample_ids)
    # (x + 1/2) / 2^32 lies in (0, 1], and the angle in [-pi, pi] comes from the signed word: one rounding each.
    uniform = words[..., 0::2].to(torch.float32) * 2.0**-32 + 2.0**-33
    signed = words[..., 1::2] - ((words[..., 1::2] >> 31) << 32)
    angle = signed.to(torch.float32) * torch.tensor(math.pi * 2.0**-31, dtype=torch.float32)
    radius = torch.sqrt(-2.0 * torch.log(uniform.to(dtype)))
    angle = angle.to(dtype)
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.flatten(1)[:, :elements].reshape(shape)
