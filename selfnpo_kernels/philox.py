"""Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of where it is used. It does not depend on how the work is split:

    counter = (element // 4, step, site, sample_id)     key = (low, high) half of the 64-bit seed

`element` is the logical row-major (NCHW) index inside one sample. Each counter yields four 32-bit integers, for the
four elements 4q .. 4q + 3. This file is the specification; csrc/philox.h and Triton compute the same integers bit for bit.
`reference.philox_normal` turns them into normals.
"""

import torch
from torch import Tensor

from selfnpo_kernels import operands

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox_4x32(counter: Tensor, seed: int | Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 `[..., 4]`, each entry an unsigned 32-bit word.
        seed: 64-bit key, or a tensor of one int64 element.

    Returns:
        int64 `[..., 4]` with unsigned 32-bit words.
    """
    if not isinstance(seed, Tensor):
        seed = seed if seed < 2**63 else seed - 2**64
    shape = (2, *(1,) * (counter.ndim - 1))  # words 0 and 2 are processed together, and so are 1 and 3
    which = torch.arange(2, device=counter.device).reshape(shape)
    multipliers, weyl = (first + which * (second - first) for first, second in (MULTIPLIERS, WEYL))
    key = (seed >> (32 * which)) & MASK
    even, odd = counter[..., 0::2].movedim(-1, 0), counter[..., 1::2].movedim(-1, 0)
    for _ in range(10):
        # The 64-bit products wrap as signed integers; masking after the shift recovers the unsigned high word.
        product = (even * multipliers).flip(0)
        even, odd = ((product >> 32) & MASK) ^ odd ^ key, product & MASK
        key = (key + weyl) & MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1)


def words(blocks: int, seed: int | Tensor, step: int | Tensor, site: int, sample_ids: Tensor) -> Tensor:
    """Integers from the first `blocks` counters of every sample: int64 `[B, blocks, 4]`."""
    block, ids = torch.broadcast_tensors(
        torch.arange(blocks, device=sample_ids.device), sample_ids.to(torch.int64)[:, None] & MASK
    )
    # Filled on the device, not copied from the host, because a captured graph would not see changes there.
    step, site = (torch.zeros_like(ids) + (value & MASK) for value in (step, site))
    return philox_4x32(torch.stack((block, step, site, ids), dim=-1), seed)


def philox_uniform(seed: int | Tensor, step: int | Tensor, site: int, sample_ids: Tensor) -> Tensor:
    """One uniform number in [0, 1) per sample id, exact in float64: `[B]`.

    Args:
        seed, step, site: unsigned integers of 64, 32 and 32 bits. Seed and step may each be one int64 element.
        sample_ids: `[B]`, integers.

    Raises:
        ValueError: sample_ids is not such a tensor, or numbers are out of range.
    """
    operands.check_tensor("philox_uniform", "sample_ids", sample_ids)
    if sample_ids.ndim != 1 or sample_ids.is_floating_point():
        raise ValueError(
            f"philox_uniform got sample_ids {tuple(sample_ids.shape)} of {sample_ids.dtype}; expected [B] of torch.int64"
        )
    for name, value, bits in (("seed", seed, 64), ("step", step, 32)):
        operands.counter("philox_uniform", name, value, bits, getattr(value, "device", None))
    operands.integer("philox_uniform", "site", site, 32)
    return words(1, seed, step, site, sample_ids)[:, 0, 0].double() * 2.0**-32
