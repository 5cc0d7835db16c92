"""The specification of every op in plain PyTorch. Read this first.

Everything between two network evaluations is affine in the sample and the model output. So each op takes per-sample
coefficient rows and needs no schedule, sampler or prediction type (`selfnpo.schedule` makes the rows). The ops compute in
float32, or in float64 when the sample is float64, and return the sample's dtype. Seed, step and guidance scale may also be
device tensors.

Shapes: `B` samples of any trailing shape, rows `[B, columns]`. A coefficient of zero removes its operand even if that
operand is inf or NaN, so a finished sample simply has the row (1, 0).
"""

import math

import torch
from torch import Tensor

from selfnpo_kernels.operands import check_tensor
from selfnpo_kernels.philox import words


def _working_dtype(sample: Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def affine(row: Tensor, *operands: Tensor) -> Tensor:
    """sum_k row[:, k] * operands[k], where a zero coefficient drops its operand."""
    dtype = _working_dtype(operands[0])
    total = torch.zeros((), dtype=dtype, device=operands[0].device)
    for coefficient, operand in zip(row.to(dtype).unbind(1), operands, strict=True):
        coefficient = coefficient.reshape(-1, *[1] * (operand.ndim - 1))
        total = total + torch.where(coefficient == 0, 0.0, coefficient * operand.to(dtype))
    return total


def tweedie(sample: Tensor, model_output: Tensor, rows: Tensor) -> Tensor:
    """pred_original_sample = p x + q m with rows (p, q) `[B, 2]`: the posterior mean E[x_0 | x_t] (Tweedie's formula)."""
    return affine(rows, sample, model_output).to(sample.dtype)


def guided_step(
    sample: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float | Tensor, rows: Tensor
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
    pred_original_sample = affine(rows[:, :2], sample, model_output)
    prev_sample = affine(rows[:, 2:], sample, model_output)
    return prev_sample.to(sample.dtype), pred_original_sample.to(sample.dtype)


def philox_normal(
    shape: tuple[int, ...],
    seed: int | Tensor,
    step: int | Tensor,
    site: int,
    sample_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` = `[B, ...]` by Box-Muller, on the device of `sample_ids` (`[B]`, integer).

    Uniform numbers and angles are always rounded to float32. So a float64 result is the same noise, only with exact
    logarithms and cosines.
    """
    elements = math.prod(shape[1:])
    word = words((elements + 3) // 4, seed, step, site, sample_ids)
    # (x + 1/2) / 2^32 lies in (0, 1], and the angle in [-pi, pi] comes from the signed word: one rounding each.
    uniform = word[..., 0::2].to(torch.float32) * 2.0**-32 + 2.0**-33
    signed = word[..., 1::2] - ((word[..., 1::2] >> 31) << 32)
    angle = signed.to(torch.float32) * torch.tensor(math.pi * 2.0**-31, dtype=torch.float32)
    radius = torch.sqrt(-2.0 * torch.log(uniform.to(dtype)))
    angle = angle.to(dtype)
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.flatten(1)[:, :elements].reshape(shape)


def forward_jump(
    sample: Tensor, rows: Tensor, seed: int | Tensor, step: int | Tensor, sample_ids: Tensor, site: int = 0
) -> Tensor:
    """x_s = a x_t + b z with rows (a, b) `[B, 2]` and z = philox_normal(seed, step, site, sample_ids).

    From time t to a noisier time s: a = alpha_s / alpha_t, b^2 = sigma_s^2 - a^2 sigma_t^2 (Self-NPO, arXiv 2505.11777).
    """
    noise = philox_normal(tuple(sample.shape), seed, step, site, sample_ids, _working_dtype(sample))
    return affine(rows, sample, noise).to(sample.dtype)


def cfg_combine(model_output: Tensor, guidance_scale: float | Tensor, guidance_rescale: float = 0.0) -> Tensor:
    """Guidance on one batched output [negative; positive] of `[2 B, ...]`: (w + 1) pos - w neg with w = guidance_scale - 1.

    `guidance_rescale` mixes in the result rescaled to the positive's per-sample standard deviation (Lin et al.,
    arXiv 2305.08891, section 3.4), as diffusers' `rescale_noise_cfg` does.
    """
    if len(model_output) % 2:
        raise ValueError(f"cfg_combine got {len(model_output)} samples; expected [negative; positive], an even batch")
    negative, positive = model_output.to(_working_dtype(model_output)).chunk(2)
    combined = negative + guidance_scale * (positive - negative)
    if guidance_rescale:
        ratio = _deviation(positive) / _deviation(combined)
        factor = guidance_rescale * ratio + (1 - guidance_rescale)
        combined = factor.reshape(-1, *[1] * (combined.ndim - 1)) * combined
    return combined.to(model_output.dtype)


def _deviation(value: Tensor) -> Tensor:
    """Standard deviation of every sample, up to a factor that cancels in a ratio."""
    value = value.unsqueeze(-1).flatten(1)
    return torch.linalg.vector_norm(value - value.mean(1, keepdim=True), dim=1)


def x0_loss(
    model_output: Tensor, sample: Tensor, target: Tensor, rows: Tensor, kind: str = "l2", huber_c: float = 1e-3
) -> Tensor:
    """Mean distance between the x_0 that the model output implies and `target`, weighted per sample: a scalar.

        d = p x_s + q m - k target;   l2: mean d^2;   huber: mean (sqrt(d^2 + c^2) - c)

    rows (p, q, k) `[B, 3]` already include the weight: k = 1 compares x_0, k = alpha_s / sigma_s compares epsilon.
    """
    difference = _difference(model_output, sample, target, rows)
    if kind == "l2":
        return difference.square().mean()
    if kind == "huber":
        return (torch.sqrt(difference.square() + huber_c**2) - huber_c).mean()
    raise ValueError(f"unknown loss kind {kind!r}; expected 'l2' or 'huber'")


def x0_loss_backward(
    grad: Tensor,
    model_output: Tensor,
    sample: Tensor,
    target: Tensor,
    rows: Tensor,
    kind: str,
    huber_c: float,
    operand: int,
) -> Tensor:
    """grad times the gradient of `x0_loss` for operand 0 (sample), 1 (model_output) or 2 (target)."""
    difference = _difference(model_output, sample, target, rows)
    slope = 2 * difference
    if kind == "huber":
        slope = difference / torch.sqrt(difference.square() + huber_c**2)
    coefficient = rows[:, operand : operand + 1] * (-1 if operand == 2 else 1)
    return affine(coefficient, slope * grad.to(slope.dtype) / slope.numel())


def _difference(model_output: Tensor, sample: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    return affine(rows * rows.new_tensor([1, 1, -1]), sample, model_output, target)


def split_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 weights into their nearest bfloat16 (ties round away from zero) and an int16 remainder, losslessly.

    The bits of the two add up: bits(weights) = (bits(high) << 16) + low.
    """
    _check_dtype("split_weights", "weights", weights, torch.float32)
    bits = weights.view(torch.int32)
    bits = torch.where(weights.isnan(), 0x7FC00000, bits)  # an all-ones NaN, as GPUs produce it, would round to -0
    high = ((bits.long() + 0x8000) >> 16 << 16).to(torch.int32)
    return high.view(torch.float32).to(torch.bfloat16), (bits - high).to(torch.int16)


def join_weights(high: Tensor, low: Tensor) -> Tensor:
    """The float32 weights from the two parts that `split_weights` returned."""
    _check_dtype("join_weights", "high", high, torch.bfloat16)
    _check_dtype("join_weights", "low", low, torch.int16)
    return (high.float().view(torch.int32) + low.int()).view(torch.float32)


def _check_dtype(function: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    check_tensor(function, name, tensor)
    if tensor.dtype != dtype:
        raise ValueError(f"{function} got {name} of {tensor.dtype}; expected {dtype}, for example {name}.to({dtype})")


def fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    lows: list[Tensor],
    emas: list[Tensor],
    ema_lows: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on every parameter, and of its moving average.

    g = grad_scale grad;   m += (1 - beta1) (g - m);   v = beta2 v + (1 - beta2) g^2
    param = (1 - lr weight_decay) param - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    ema += (1 - ema_decay) (param - ema)
    """
    correction1, correction2 = (1 - torch.tensor(beta, dtype=torch.float64) ** step.cpu() for beta in (beta1, beta2))
    step_size, correction2_sqrt = lr / correction1.to(lr), correction2.sqrt().to(lr)
    for i, param in enumerate(params):
        weights = join_weights(param, lows[i]) if lows else param
        grad = grads[i].to(weights.dtype) * (1.0 if grad_scale is None else grad_scale)
        exp_avgs[i].add_((1 - beta1) * (grad - exp_avgs[i]))
        exp_avg_sqs[i].mul_(beta2).add_((1 - beta2) * grad * grad)
        update = exp_avgs[i] / (exp_avg_sqs[i].sqrt() / correction2_sqrt + eps)
        weights = weights * (1 - lr * weight_decay) - step_size * update
        _assign(weights, param, lows[i] if lows else None)
        if emas:
            ema = join_weights(emas[i], ema_lows[i]) if ema_lows else emas[i]
            _assign(ema + (1 - ema_decay) * (weights - ema), emas[i], ema_lows[i] if ema_lows else None)


def _assign(weights: Tensor, param: Tensor, low: Tensor | None) -> None:
    if low is None:
        param.copy_(weights)
    else:
        for half, value in zip((param, low), split_weights(weights), strict=True):
            half.copy_(value)
