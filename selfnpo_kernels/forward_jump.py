"""x_s = a x_t + b z in one pass over memory, the noise drawn where it is used and never stored."""

import warnings

import torch
from torch import Tensor

from selfnpo_kernels import extension, reference


def forward_jump(sample: Tensor, rows: Tensor, seed: int, step: int, sample_ids: Tensor, site: int = 0) -> Tensor:
    """Diffuse every sample from its time t to a noisier time s. See `reference.forward_jump` for the formula.

    Args:
        sample: `[B, ...]`, floating point.
        rows: (a, b) per sample, `[B, 2]`.
        seed, step, site: who draws, when and what for; unsigned, 64, 32 and 32 bits.
        sample_ids: `[B]` int64, which sample of the run each row of the batch is; low 32 bits count.

    Returns:
        Tensor like `sample`. On the CPU in float32 the compiled kernel moves 8 bytes per element, elsewhere the reference
        runs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    batch = len(sample) if sample.ndim else -1
    if batch < 0 or rows.shape != (batch, 2) or sample_ids.shape != (batch,):
        raise ValueError(
            f"forward_jump got sample {tuple(sample.shape)}, rows {tuple(rows.shape)}, "
            f"sample_ids {tuple(sample_ids.shape)}; expected [B, ...], [B, 2] and [B]"
        )
    if not sample.is_floating_point() or sample_ids.is_floating_point():
        raise ValueError(f"forward_jump needs a float sample and integer ids; got {sample.dtype} and {sample_ids.dtype}")
    if not sample.device == rows.device == sample_ids.device:
        raise ValueError(f"forward_jump needs one device; got {sample.device}, {rows.device} and {sample_ids.device}")
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("site", site, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"forward_jump needs {name} in [0, 2^{bits}); got {value}")

    if extension._C is None:
        warnings.warn(f"selfnpo_kernels._C is {extension.describe()}", RuntimeWarning, stacklevel=2)
    needs_gradient = torch.is_grad_enabled() and (sample.requires_grad or rows.requires_grad)
    if extension._C is None or sample.device.type != "cpu" or sample.dtype != torch.float32 or needs_gradient:
        return reference.forward_jump(sample, rows, seed, step, sample_ids, site)
    sample, rows = sample.contiguous(), rows.to(torch.float32).contiguous()
    sample_ids = sample_ids.to(torch.int64).contiguous()
    out = torch.empty_like(sample)
    if out.numel():
        extension._C.forward_jump(
            out.data_ptr(), sample.data_ptr(), rows.data_ptr(), sample_ids.data_ptr(), batch=batch,
            elements=sample[0].numel(), seed=seed, step=step, site=site, threads=torch.get_num_threads(),
        )  # fmt: skip
    return out
