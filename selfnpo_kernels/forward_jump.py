"""x_s = a x_t + b z in one pass over memory. The noise is generated where it is used and never stored."""

import torch
from torch import Tensor

from selfnpo_kernels import extension, operands, reference
from selfnpo_kernels.dispatch import backend_for
from selfnpo_kernels.extension import typed
from selfnpo_kernels.registration import register


def forward_jump(
    sample: Tensor, rows: Tensor, seed: int | Tensor, step: int | Tensor, sample_ids: Tensor, site: int = 0
) -> Tensor:
    """Diffuse every sample from its time t to a noisier time s.

        x_s = a x_t + b z,   z = philox_normal(x_t.shape, seed, step, site, sample_ids)

    Memory traffic per float32 element: 4 bytes read and 4 written. The noise depends only on its arguments and the logical
    row-major index, so a sample jumps the same way in any batch, memory format and dtype, and on any backend: the random
    integers are identical, and the normals agree to 5e-7 (beyond |z| = 2, to 2.5e-7 of z).

    Args:
        sample: `[B, ...]`, any floating-point dtype, up to 2^34 elements per sample.
        rows: (a, b) `[B, 2]`, float32: a = alpha_s / alpha_t, b^2 = sigma_s^2 - a^2 sigma_t^2. A zero removes its operand.
        seed, step, site: the run, the time and the purpose of the draw; unsigned integers of 64, 32 and 32 bits. Seed and
            step may each be a tensor of one int64 element on the sample's device.
        sample_ids: `[B]` int64, the number of each sample in the run; only the low 32 bits are used.

    Returns:
        Tensor like `sample`, in its memory format. Gradients flow to `sample`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or numbers are out of range; on the CPU also a NaN in `rows`,
            which means a negative variance (s less noisy than t).
    """
    operands.check("forward_jump", sample, 2, rows)
    check_noise("forward_jump", tuple(sample.shape), sample_ids, sample.device, site)
    seed, seed_tensor = operands.counter("forward_jump", "seed", seed, 64, sample.device)
    step, step_tensor = operands.counter("forward_jump", "step", step, 32, sample.device)
    return _op(sample, rows, sample_ids, seed, seed_tensor, step, step_tensor, site)


def check_noise(op: str, shape: tuple[int, ...], sample_ids: Tensor, device: torch.device, site: int) -> None:
    """Raises: ValueError if the arguments of the noise do not fit the samples."""
    operands.check_tensor(op, "sample_ids", sample_ids)
    if sample_ids.shape != shape[:1] or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"{op} got sample_ids {tuple(sample_ids.shape)} of {sample_ids.dtype} for samples {shape}; "
            f"expected ({shape[0]},) of torch.int64, one id per sample"
        )
    if sample_ids.device != device:
        raise ValueError(f"{op} got sample_ids on {sample_ids.device} and sample on {device}; move them to one device")
    operands.integer(op, "site", site, 32)
    elements = 1
    for size in shape[1:]:
        elements *= size
    if elements > 2**34:
        raise ValueError(
            f"{op} got {elements} elements per sample; the noise generator supports up to 2^34; split the sample"
        )


def _run(sample, rows, sample_ids, seed, seed_tensor, step, step_tensor, site):
    if rows.device.type == "cpu" and rows.isnan().any():
        raise ValueError(
            "forward_jump got a NaN in rows, which means a negative variance; expected every s to be noisier than its t"
        )
    order = operands.memory_format(sample)
    seed, step = operands.unsigned(seed, seed_tensor), operands.unsigned(step, step_tensor)
    backend = backend_for("forward_jump", sample)
    if backend == "reference":
        return reference.forward_jump(sample, rows, seed, step, sample_ids, site).contiguous(memory_format=order)
    out = torch.empty_like(sample, memory_format=order)
    launch(backend, out, sample, rows, sample_ids, seed, step, site, order)
    return out


def launch(
    backend: str,
    out: Tensor,
    sample: Tensor | None,
    rows: Tensor,
    sample_ids: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    site: int,
    order: torch.memory_format,
) -> None:
    """Fill the output. `philox_normal` uses it without a sample and with the row (0, 1)."""
    if not out.numel():
        return
    sample, sample_ids = operands.dense(sample, order), sample_ids.contiguous()
    rows = operands.dense_rows(rows)
    # In channels-last order, the channels of a position are next to each other.
    channels = out.shape[1] if order != torch.contiguous_format else 1
    positions = out[0].numel() // channels
    if backend == "triton":
        from selfnpo_kernels.triton_kernels import forward_jump as triton_kernel

        triton_kernel.launch(out, sample, rows, sample_ids, seed, step, site, channels, positions)
        return
    extension._C.forward_jump(
        typed(out), typed(sample), (rows.data_ptr(), rows.stride(0)), sample_ids.data_ptr(), len(out), channels, positions,
        int(seed) % 2**64, int(step) % 2**32, site, torch.get_num_threads(),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad):
    (rows,) = ctx.saved_tensors
    return reference.affine(rows[:, :1], grad).to(ctx.dtype), None, None, None, None, None, None, None


_op = register(
    "forward_jump",
    "(Tensor sample, Tensor rows, Tensor sample_ids, SymInt seed, Tensor? seed_tensor, SymInt step, Tensor? step_tensor, "
    "int site) -> Tensor",
    _run, operands.empty_like, _setup_context, _backward,
)  # fmt: skip
