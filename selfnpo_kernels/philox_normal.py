"""The noise of `forward_jump`, as an op of its own."""

import torch
from torch import Tensor

from selfnpo_kernels import operands, reference
from selfnpo_kernels.dispatch import backend_for
from selfnpo_kernels.forward_jump import check_noise, launch
from selfnpo_kernels.registration import register

_NOISE_ALONE = torch.tensor([[0.0, 1.0]])


def philox_normal(
    shape: tuple[int, ...],
    seed: int | Tensor,
    step: int | Tensor = 0,
    site: int = 0,
    sample_ids: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise from the counter-based generator Philox4x32-10 (Salmon et al., SC 2011).

    Every number is a pure function of (seed, step, site, sample id, index inside the sample), in every batch and on every
    device and backend; see `selfnpo_kernels.philox` for the counters. Writes 4 bytes per float32 element.

    Args:
        shape: `[B, ...]`, up to 2^34 elements per sample.
        seed, step, site: unsigned integers of 64, 32 and 32 bits. Seed and step may each be one int64 element on `device`.
        sample_ids: `[B]` int64; by default 0 .. B - 1.
        device: by default that of `sample_ids`.

    Returns:
        Row-major tensor with `shape` and `dtype`. In float64 it is the same noise, with exact logarithms and cosines.

    Raises:
        ValueError: shapes or devices do not match, or numbers are out of range.
    """
    if not isinstance(shape, tuple | list):
        raise ValueError(f"philox_normal got shape {shape!r}; expected a tuple of integers, [B, ...]")
    if not shape:
        raise ValueError("philox_normal got an empty shape; expected [B, ...]")
    shape = tuple([size if type(size) is int else operands.integer("philox_normal", "shape", size, 63) for size in shape])
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"philox_normal got dtype {dtype}; expected a floating-point dtype, such as torch.float32")
    if sample_ids is None:
        sample_ids = torch.arange(shape[0], device=device)
    else:
        operands.check_tensor("philox_normal", "sample_ids", sample_ids)
        sample_ids = sample_ids if device is None else sample_ids.to(device)
    check_noise("philox_normal", shape, sample_ids, sample_ids.device, site)
    seed, seed_tensor = operands.counter("philox_normal", "seed", seed, 64, sample_ids.device)
    step, step_tensor = operands.counter("philox_normal", "step", step, 32, sample_ids.device)
    return _op(shape, sample_ids, seed, seed_tensor, step, step_tensor, site, dtype)


def _run(shape, sample_ids, seed, seed_tensor, step, step_tensor, site, dtype):
    seed, step = operands.unsigned(seed, seed_tensor), operands.unsigned(step, step_tensor)
    out = torch.empty(shape, dtype=dtype, device=sample_ids.device)
    backend = backend_for("philox_normal", out)
    if backend == "reference":
        working = torch.float64 if dtype == torch.float64 else torch.float32
        return out.copy_(reference.philox_normal(shape, seed, step, site, sample_ids, working))
    rows = _NOISE_ALONE.expand(shape[0], 2)
    launch(backend, out, None, rows, sample_ids, seed, step, site, torch.contiguous_format)
    return out


def _fake(shape, sample_ids, seed, seed_tensor, step, step_tensor, site, dtype):
    return torch.empty(shape, dtype=dtype, device=sample_ids.device)


_op = register(
    "philox_normal",
    "(SymInt[] shape, Tensor sample_ids, SymInt seed, Tensor? seed_tensor, SymInt step, Tensor? step_tensor, int site, "
    "ScalarType dtype) -> Tensor",
    _run, _fake,
)  # fmt: skip
