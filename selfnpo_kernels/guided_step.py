"""Guidance, Tweedie estimate and deterministic DDIM step in one pass over memory."""

import torch
from torch import Tensor

from selfnpo_kernels import extension, operands, reference
from selfnpo_kernels.dispatch import backend_for
from selfnpo_kernels.extension import typed
from selfnpo_kernels.registration import register


def guided_step(
    sample: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float | Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of a sampler from two model outputs.

        m = uncond + guidance_scale (cond - uncond);  x_0 = p0 x + q0 m;  x_prev = p1 x + q1 m

    Memory traffic per float32 element: 12 bytes read (8 without `uncond`) and 8 written.

    Args:
        sample, cond, uncond: `[B, ...]`, any floating-point dtype; `uncond=None` means m = cond.
        guidance_scale: a number, or one float32 element on the sample's device.
        rows: (p0, q0, p1, q1) `[B, 4]`, float32. A zero removes its operand, even an infinite one.

    Returns:
        (prev_sample, pred_original_sample), in the sample's dtype and memory format. Gradients flow to the first three
        arguments.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the guidance scale is not finite.
    """
    if uncond is None:
        operands.check("guided_step", sample, 4, rows, cond=cond)
    else:
        operands.check("guided_step", sample, 4, rows, cond=cond, uncond=uncond)
    scale, scale_tensor = operands.scalar("guided_step", "guidance_scale", guidance_scale, sample)
    return _op(sample, cond, uncond, rows, scale, scale_tensor)


def _run(sample, cond, uncond, rows, scale, scale_tensor):
    order, scale_or_tensor = operands.memory_format(sample), scale if scale_tensor is None else scale_tensor
    backend = backend_for("guided_step", sample)
    if backend == "reference":
        results = reference.guided_step(sample, cond, uncond, scale_or_tensor, rows)
        return tuple(result.contiguous(memory_format=order) for result in results)
    prev_sample = torch.empty_like(sample, memory_format=order)
    pred_original_sample = torch.empty_like(sample, memory_format=order)
    launch(backend, prev_sample, pred_original_sample, sample, cond, uncond, rows, scale_or_tensor, order)
    return prev_sample, pred_original_sample


def launch(
    backend: str,
    prev_sample: Tensor | None,
    pred_original_sample: Tensor,
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    rows: Tensor,
    scale: float | Tensor,
    order: torch.memory_format,
) -> None:
    """Fill the outputs. `tweedie` uses it without `prev_sample` and `uncond`."""
    if not sample.numel():
        return
    sample, cond, uncond = (operands.dense(tensor, order) for tensor in (sample, cond, uncond))
    rows = operands.dense_rows(rows)
    if backend == "triton":
        from selfnpo_kernels.triton_kernels import guided_step as triton_kernel

        triton_kernel.launch(prev_sample, pred_original_sample, sample, cond, uncond, rows, scale)
        return
    extension._C.guided_step(
        typed(prev_sample), typed(pred_original_sample), typed(sample), typed(cond), typed(uncond),
        (rows.data_ptr(), rows.stride(0)), float(scale), len(sample), sample[0].numel(), torch.get_num_threads(),
    )  # fmt: skip


def _fake(sample, *others):
    return operands.empty_like(sample), operands.empty_like(sample)


def _setup_context(ctx, inputs, output):
    sample, cond, uncond, rows, ctx.scale, scale_tensor = inputs
    ctx.dtypes = sample.dtype, cond.dtype, None if uncond is None else uncond.dtype
    ctx.save_for_backward(rows, scale_tensor)


def _backward(ctx, grad_prev, grad_original):
    rows, scale_tensor = ctx.saved_tensors
    scale = ctx.scale if scale_tensor is None else scale_tensor
    sample_dtype, cond_dtype, uncond_dtype = ctx.dtypes
    grad_sample = reference.affine(rows[:, 0::2], grad_original, grad_prev).to(sample_dtype)
    grad_output = reference.affine(rows[:, 1::2], grad_original, grad_prev)
    if uncond_dtype is None:
        return grad_sample, grad_output.to(cond_dtype), None, None, None, None
    grad_cond, grad_uncond = (scale * grad_output).to(cond_dtype), ((1 - scale) * grad_output).to(uncond_dtype)
    return grad_sample, grad_cond, grad_uncond, None, None, None


_op = register(
    "guided_step",
    "(Tensor sample, Tensor cond, Tensor? uncond, Tensor rows, float scale, Tensor? scale_tensor) -> (Tensor, Tensor)",
    _run, _fake, _setup_context, _backward,
)  # fmt: skip
