"""Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of where it is used, never of how the work was split:

    counter = (element // 4, step, site, sample_id)     key = (low, high) half of the 64-bit seed

`element` is the logical row-major (NCHW) index inside one sample. Each counter yields four 32-bit integers, hence the
four elements 4q .. 4q + 3. This file is the specification; csrc/philox.h and Triton compute the same integers bit for bit.
`reference.philox_normal` makes normals of them.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox_4x32(counter: Tensor, seed: int | Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 `[..., 4]`, each entry an unsigned 32-bit word.
        seed: 64-bit key; a tensor holds it as int64.

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


def words(blocks: int, seed: int | Tensor, step: int | Tensor, site: int, sample_ids: Tensor) -> Tensor:
    """Integers of the first `blocks` counters of every sample: int64 `[B, blocks, 4]`."""
    block, ids = torch.broadcast_tensors(
        torch.arange(blocks, device=sample_ids.device), sample_ids.to(torch.int64)[:, None] & MASK
    )
    # Filled where they are used, not copied from the host: a captured graph could not follow that.
    step, site = (torch.zeros_like(ids) + (value & MASK) for value in (step, site))
    return philox_4x32(torch.stack((block, step, site, ids), dim=-1), seed)


def philox_uniform(seed: int | Tensor, step: int | Tensor, site: int, sample_ids: Tensor) -> Tensor:
    """One uniform number in [0, 1) per sample id, exact in float64: `[B]`."""
    return words(1, seed, step, site, sample_ids)[:, 0, 0].double() * 2.0**-32
