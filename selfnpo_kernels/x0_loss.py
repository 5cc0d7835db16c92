"""The training loss in x_0 form: one pass over memory forward and one backward, with nothing stored in between."""

import torch
from torch import Tensor

from selfnpo_kernels import extension, operands, reference
from selfnpo_kernels.dispatch import backend_for
from selfnpo_kernels.extension import typed
from selfnpo_kernels.registration import register


def x0_loss(
    model_output: Tensor, sample: Tensor, target: Tensor, rows: Tensor, kind: str = "l2", huber_c: float = 1e-3
) -> Tensor:
    """Mean distance, over all elements, between `target` and the x_0 that a model output implies.

        d = p x_s + q m - k target;   l2: mean d^2;   huber: mean (sqrt(d^2 + c^2) - c)

    The rows include the weight: k = 1 compares x_0, k = alpha_s / sigma_s compares epsilon. Memory traffic per float32
    element: 12 bytes read forward; 12 read and 4 written backward. Sums have a fixed order, so results are bit-identical.

    Args:
        model_output, sample, target: `[B, ...]`, any floating-point dtype.
        rows: (p, q, k) `[B, 3]`, float32. A zero removes its operand, even an infinite one.
        kind: "l2" or "huber" (pseudo-Huber).
        huber_c: the value of d at which the pseudo-Huber loss changes from quadratic to linear.

    Returns:
        Scalar, float32 (float64 for a float64 sample); NaN for an empty batch, like `torch.mean`. Gradients flow to the
        first three arguments.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the kind is unknown, or huber_c is not positive.
    """
    operands.check("x0_loss", sample, 3, rows, model_output=model_output, target=target)
    if kind not in ("l2", "huber"):
        raise ValueError(f"x0_loss got kind {kind!r}; expected 'l2' or 'huber'")
    huber_c = operands.number("x0_loss", "huber_c", huber_c, "a positive number, for example 1e-3")
    if kind == "huber" and huber_c <= 0:
        raise ValueError(f"x0_loss got huber_c = {huber_c}; expected a positive number, for example 1e-3")
    return _op(model_output, sample, target, rows, kind, huber_c)


def _run(model_output, sample, target, rows, kind, huber_c):
    backend = backend_for("x0_loss", sample)
    if backend == "reference" or not sample.numel():
        return reference.x0_loss(model_output, sample, target, rows, kind, huber_c)
    tensors, rows = _dense(model_output, sample, target), operands.dense_rows(rows)
    if backend == "triton":
        from selfnpo_kernels.triton_kernels import x0_loss as triton_kernel

        return triton_kernel.launch(*tensors, rows, kind, huber_c)
    return torch.tensor(
        extension._C.x0_loss(
            *map(typed, tensors), (rows.data_ptr(), rows.stride(0)), kind == "huber", huber_c,
            len(sample), sample[0].numel(), torch.get_num_threads(),
        ),
        dtype=torch.float32,
    )  # fmt: skip


def _run_backward(grad, model_output, sample, target, rows, kind, huber_c, operand):
    """The gradient of operand 0 (sample), 1 (model_output) or 2 (target)."""
    like = (sample, model_output, target)[operand]
    order = operands.memory_format(model_output)
    backend = backend_for("x0_loss", sample)
    if backend == "reference" or like.dtype not in extension.DTYPES:
        result = reference.x0_loss_backward(grad, model_output, sample, target, rows, kind, huber_c, operand)
        return result.to(like.dtype).contiguous(memory_format=order)
    out = torch.empty_like(like, memory_format=order)
    if not out.numel():
        return out
    tensors, rows = _dense(model_output, sample, target), operands.dense_rows(rows)
    if backend == "triton":
        from selfnpo_kernels.triton_kernels import x0_loss as triton_kernel

        triton_kernel.launch_backward(out, grad, *tensors, rows, kind, huber_c, operand)
        return out
    extension._C.x0_loss_backward(
        typed(out), grad.item() / out.numel(), operand, *map(typed, tensors), (rows.data_ptr(), rows.stride(0)),
        kind == "huber", huber_c, len(sample), sample[0].numel(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _dense(model_output: Tensor, sample: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sample, model_output, target), ordered like the rows' columns, in the model output's memory order."""
    order = operands.memory_format(model_output)
    return tuple(operands.dense(tensor, order) for tensor in (sample, model_output, target))


def _fake(model_output, sample, target, rows, kind, huber_c):
    return sample.new_empty((), dtype=torch.float64 if sample.dtype == torch.float64 else torch.float32)


def _fake_backward(grad, model_output, sample, target, rows, kind, huber_c, operand):
    like = (sample, model_output, target)[operand]
    return torch.empty_like(like, memory_format=operands.memory_format(model_output))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kind, ctx.huber_c = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    def of(operand: int) -> Tensor:
        return _backward_op(grad, *ctx.saved_tensors, ctx.kind, ctx.huber_c, operand)

    model_output, sample, target = ctx.needs_input_grad[:3]
    return of(1) if model_output else None, of(0) if sample else None, of(2) if target else None, None, None, None


_ARGUMENTS = "Tensor model_output, Tensor sample, Tensor target, Tensor rows, str kind, float huber_c"
_op = register("x0_loss", f"({_ARGUMENTS}) -> Tensor", _run, _fake, _setup_context, _backward)
_backward_op = register(
    "x0_loss_backward", f"(Tensor grad, {_ARGUMENTS}, int operand) -> Tensor", _run_backward, _fake_backward
)
