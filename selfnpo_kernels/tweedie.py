"""The posterior mean of x_0 by Tweedie's formula, in one pass over memory."""

import torch
from torch import Tensor

from selfnpo_kernels import operands, reference
from selfnpo_kernels.dispatch import backend_for
from selfnpo_kernels.guided_step import launch
from selfnpo_kernels.registration import register


def tweedie(sample: Tensor, model_output: Tensor, rows: Tensor) -> Tensor:
    """pred_original_sample = p x + q m, the estimate E[x_0 | x_t] (Robbins 1956; Efron 2011).

    Memory traffic per float32 element: 8 bytes read and 4 written.

    Args:
        sample, model_output: `[B, ...]`, any floating-point dtype.
        rows: (p, q) `[B, 2]`, float32, from the prediction type and the noise level. A zero removes its operand.

    Returns:
        Tensor like `sample`, in its memory format. Gradients flow to the first two arguments.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    operands.check("tweedie", sample, 2, rows, model_output=model_output)
    return _op(sample, model_output, rows)


def _run(sample, model_output, rows):
    order = operands.memory_format(sample)
    backend = backend_for("tweedie", sample)
    if backend == "reference":
        return reference.tweedie(sample, model_output, rows).contiguous(memory_format=order)
    out = torch.empty_like(sample, memory_format=order)
    launch(backend, None, out, sample, model_output, None, rows, 1.0, order)
    return out


def _setup_context(ctx, inputs, output):
    sample, model_output, rows = inputs
    ctx.dtypes = sample.dtype, model_output.dtype
    ctx.save_for_backward(rows)


def _backward(ctx, grad):
    (rows,) = ctx.saved_tensors
    sample_dtype, output_dtype = ctx.dtypes
    return reference.affine(rows[:, :1], grad).to(sample_dtype), reference.affine(rows[:, 1:], grad).to(output_dtype), None


_op = register(
    "tweedie", "(Tensor sample, Tensor model_output, Tensor rows) -> Tensor",
    _run, operands.empty_like, _setup_context, _backward,
)  # fmt: skip
