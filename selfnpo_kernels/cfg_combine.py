"""Classifier-free guidance on one batched model output."""

import torch
from torch import Tensor

from selfnpo_kernels import extension, operands, reference
from selfnpo_kernels.dispatch import backend_for
from selfnpo_kernels.extension import typed
from selfnpo_kernels.registration import register


def cfg_combine(model_output: Tensor, guidance_scale: float | Tensor, guidance_rescale: float = 0.0) -> Tensor:
    """(w + 1) positive - w negative with w = guidance_scale - 1, from the batch [negative; positive].

    `guidance_rescale` mixes in the result, rescaled to the positive's per-sample standard deviation (Lin et al.,
    arXiv 2305.08891, section 3.4), as diffusers' `rescale_noise_cfg` does. 0 turns it off.

    Memory traffic per float32 element of the output: 8 bytes read and 4 written; rescaling reads the input twice.

    Args:
        model_output: `[2 B, ...]`, any floating-point dtype.
        guidance_scale: a number, or one float32 element on the model output's device.

    Returns:
        `[B, ...]` in the model output's dtype and memory format. Gradients flow to `model_output`.

    Raises:
        ValueError: the batch is odd, or the guidance scale or rescale is not finite.
    """
    operands.check_kind("cfg_combine", "model_output", model_output)
    if model_output.ndim == 0 or model_output.shape[0] % 2:
        raise ValueError(
            f"cfg_combine got a model output of shape {tuple(model_output.shape)}; "
            "expected [negative; positive], an even batch"
        )
    scale, scale_tensor = operands.scalar("cfg_combine", "guidance_scale", guidance_scale, model_output)
    rescale = operands.number("cfg_combine", "guidance_rescale", guidance_rescale, "a finite number, 0 for none")
    return _op(model_output, scale, scale_tensor, rescale)


def _run(model_output, scale, scale_tensor, guidance_rescale):
    scale = scale if scale_tensor is None else scale_tensor
    order = operands.memory_format(model_output)
    backend = backend_for("cfg_combine", model_output)
    if backend == "reference":
        return reference.cfg_combine(model_output, scale, guidance_rescale).contiguous(memory_format=order)
    out = _fake(model_output)
    if not out.numel():
        return out
    model_output = operands.dense(model_output, order)
    if backend == "triton":
        from selfnpo_kernels.triton_kernels import cfg_combine as triton_kernel

        triton_kernel.launch(out, model_output, scale, guidance_rescale)
        return out
    extension._C.cfg_combine(
        typed(out), typed(model_output), float(scale), guidance_rescale, len(out), out[0].numel(), torch.get_num_threads()
    )
    return out


def _fake(model_output, *others):
    half = model_output[: model_output.shape[0] // 2]
    return torch.empty_like(half, memory_format=operands.memory_format(model_output))


def _setup_context(ctx, inputs, output):
    model_output, ctx.scale, scale_tensor, ctx.guidance_rescale = inputs
    ctx.save_for_backward(model_output if ctx.guidance_rescale else None, scale_tensor)
    ctx.dtype = model_output.dtype


def _backward(ctx, grad):
    model_output, scale_tensor = ctx.saved_tensors
    scale = ctx.scale if scale_tensor is None else scale_tensor
    dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    shape, grad, grad_positive = grad.shape, grad.to(dtype).unsqueeze(-1).flatten(1), 0.0
    if ctx.guidance_rescale:
        # out = c (f r + 1 - f), where c is the guided output, f the rescale and r = |p - mean p| / |c - mean c|.
        rescale = ctx.guidance_rescale
        negative, positive = model_output.to(dtype).unsqueeze(-1).flatten(1).chunk(2)
        guided = negative + scale * (positive - negative)
        centred_guided, centred_positive = guided - guided.mean(1, keepdim=True), positive - positive.mean(1, keepdim=True)
        guided2, positive2 = (centred.square().sum(1, keepdim=True) for centred in (centred_guided, centred_positive))
        ratio = (positive2 / guided2).sqrt()
        slope = rescale * ratio * (grad * guided).sum(1, keepdim=True)
        grad = grad * (rescale * ratio + 1 - rescale) - slope * centred_guided / guided2
        grad_positive = slope * centred_positive / positive2
    halves = ((1 - scale) * grad, scale * grad + grad_positive)
    return torch.cat([half.reshape(shape) for half in halves]).to(ctx.dtype), None, None, None


_op = register(
    "cfg_combine", "(Tensor model_output, float scale, Tensor? scale_tensor, float guidance_rescale) -> Tensor",
    _run, _fake, _setup_context, _backward,
)  # fmt: skip
