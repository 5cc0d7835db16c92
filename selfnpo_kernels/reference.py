"""The specification of every op in plain PyTorch: read this first.

Everything between two network evaluations is affine in the sample and the model output, so each op takes per-sample
coefficient rows and knows no schedule, sampler or prediction type (`selfnpo.schedule` makes the rows). The ops compute in
float32, or in float64 when the sample is float64, and return the sample's dtype.

Shapes: `B` samples of any trailing shape, rows `[B, columns]`. A coefficient of zero removes its operand even where that
operand is inf or NaN, so a finished sample is the ordinary row (1, 0).
"""

import torch
from torch import Tensor

from selfnpo_kernels.philox import philox_normal


def _working_dtype(sample: Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _affine(row: Tensor, *operands: Tensor) -> Tensor:
    """sum_k row[:, k] * operands[k], where a zero coefficient drops its operand."""
    dtype = _working_dtype(operands[0])
    total = torch.zeros((), dtype=dtype, device=operands[0].device)
    for coefficient, operand in zip(row.to(dtype).unbind(1), operands, strict=True):
        coefficient = coefficient.reshape(-1, *[1] * (operand.ndim - 1))
        total = total + torch.where(coefficient == 0, 0.0, coefficient * operand.to(dtype))
    return total


def tweedie(sample: Tensor, model_output: Tensor, rows: Tensor) -> Tensor:
    """pred_original_sample = p x + q m with rows (p, q) `[B, 2]`: the posterior mean E[x_0 | x_t] (Tweedie's formula)."""
    return _affine(rows, sample, model_output).to(sample.dtype)


def guided_step(
    sample: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Guidance, Tweedie estimate and deterministic DDIM step.

        m = uncond + guidance_scale (cond - uncond);  x_0 = p0 x + q0 m;  x_prev = p1 x + q1 m

    Args:
        sample, cond, uncond: `[B, ...]`; `uncond=None` means m = cond.
        rows: (p0, q0, p1, q1) `[B, 4]`.

    Returns:
        (prev_sample, pred_original_sample).
    """
    dtype = _working_dtype(sample)
    model_output = cond.to(dtype)
    if uncond is not None:
        model_output = uncond.to(dtype) + guidance_scale * (model_output - uncond.to(dtype))
    pred_original_sample = _affine(rows[:, :2], sample, model_output)
    prev_sample = _affine(rows[:, 2:], sample, model_output)
    return prev_sample.to(sample.dtype), pred_original_sample.to(sample.dtype)


def forward_jump(sample: Tensor, rows: Tensor, seed: int, step: int, sample_ids: Tensor, site: int = 0) -> Tensor:
    """x_s = a x_t + b z with rows (a, b) `[B, 2]` and z = philox_normal(seed, step, site, sample_ids).

    From time t to a noisier time s: a = alpha_s / alpha_t, b^2 = sigma_s^2 - a^2 sigma_t^2 (Self-NPO, arXiv 2505.11777).
    """
    noise = philox_normal(tuple(sample.shape), seed, step, site, sample_ids, _working_dtype(sample))
    return _affine(rows, sample, noise).to(sample.dtype)


def cfg_combine(model_output: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    """Guidance on one batched output [negative; positive] of `[2 B, ...]`: (w + 1) pos - w neg with w = guidance_scale - 1.

    `guidance_rescale` mixes in the result rescaled to the positive's per-sample standard deviation (Lin et al.,
    arXiv 2305.08891, section 3.4), as diffusers' `rescale_noise_cfg` does.
    """
    if len(model_output) % 2:
        raise ValueError(f"cfg_combine needs [negative; positive], an even batch: got {len(model_output)} samples")
    negative, positive = model_output.to(_working_dtype(model_output)).chunk(2)
    combined = negative + guidance_scale * (positive - negative)
    if guidance_rescale:
        axes = tuple(range(1, combined.ndim))
        rescaled = combined * (positive.std(axes, keepdim=True) / combined.std(axes, keepdim=True))
        combined = guidance_rescale * rescaled + (1 - guidance_rescale) * combined
    return combined.to(model_output.dtype)


def x0_loss(
    model_output: Tensor, sample: Tensor, target: Tensor, rows: Tensor, kind: str = "l2", huber_c: float = 1e-3
) -> Tensor:
    """Distance between the x_0 that the model output stands for and `target`, weighted per sample; a scalar mean.

        d = p x_s + q m - k target;   l2: mean d^2;   huber: mean (sqrt(d^2 + c^2) - c)

    rows (p, q, k) `[B, 3]` already hold the weight: k = 1 compares x_0, k = alpha_s / sigma_s compares epsilon.
    """
    difference = _affine(rows * rows.new_tensor([1, 1, -1]), sample, model_output, target)
    if kind == "l2":
        return difference.square().mean()
    if kind == "huber":
        return (torch.sqrt(difference.square() + huber_c**2) - huber_c).mean()
    raise ValueError(f"unknown loss kind {kind!r}: expected 'l2' or 'huber'")
