"""Checks on the arguments of ops, and the memory order in which kernels read them."""

import math
import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

from selfnpo_kernels.extension import DTYPES

_INTEGERS = (int, torch.SymInt)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def check(op: str, sample: Tensor, columns: int, rows: Tensor, **others: Tensor) -> None:
    """`others` must look like `sample`, `rows` must be `[B, columns]`.

    Raises:
        ValueError: says in one sentence what was given and what is expected.
    """
    for name, tensor in {"sample": sample, "rows": rows, **others}.items():
        check_kind(op, name, tensor)
        if tensor.device != sample.device:
            raise ValueError(f"{op} got {name} on {tensor.device} and sample on {sample.device}; move them to one device")
    if sample.ndim == 0:
        raise ValueError(f"{op} got a sample without dimensions; expected [B, ...]")
    expected_rows = (sample.shape[0], columns)
    if rows.shape != expected_rows:
        raise ValueError(
            f"{op} got rows of shape {tuple(rows.shape)}; expected {expected_rows}, one row per sample "
            f"(rows.expand({sample.shape[0]}, -1) shares one)"
        )
    if rows.requires_grad:
        raise ValueError(f"{op} has no gradient for rows; pass rows.detach()")
    for name, tensor in others.items():
        if tensor.shape != sample.shape:
            raise ValueError(f"{op} got {name} of shape {tuple(tensor.shape)}; expected {tuple(sample.shape)}, like sample")


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raises: ValueError for a list, a NumPy array or anything else that is not a tensor."""
    if not isinstance(value, Tensor):
        remedy = "" if value is None else f", for example torch.as_tensor({name})"
        raise ValueError(f"{op} got {name} of type {type(value).__name__}; expected a tensor{remedy}")


def check_kind(op: str, name: str, tensor: Tensor) -> None:
    """Raises: ValueError if `tensor` is not a dense floating-point tensor."""
    check_tensor(op, name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{op} got {name} of {tensor.dtype}; expected a floating-point dtype, for example {name}.float()")
    if tensor.layout != torch.strided:
        raise ValueError(f"{op} got {name} in {tensor.layout}; expected a dense tensor, for example {name}.to_dense()")


def scalar(op: str, name: str, value: float | Tensor, sample: Tensor) -> tuple[float, Tensor | None]:
    """A finite number, or a tensor of one float32 element on the sample's device, which a captured graph may change."""
    if not isinstance(value, Tensor):
        return number(op, name, value), None
    check_scalar_tensor(op, name, value, torch.float32, sample.device)
    return 0.0, value


def number(op: str, name: str, value: float, expected: str = "a finite number") -> float:
    """A plain number as a float.

    Raises:
        ValueError: it is not a finite number.
    """
    try:
        if not isinstance(value, Tensor) and math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    _refuse(op, name, value, expected)


def _refuse(op: str, name: str, value: Any, expected: str) -> NoReturn:
    got = f"= {value}" if isinstance(value, int | float) else f"of type {type(value).__name__}"
    raise ValueError(f"{op} got {name} {got}; expected {expected}")


def counter(op: str, name: str, value: int | Tensor, bits: int, device: torch.device) -> tuple[int, Tensor | None]:
    """An unsigned integer, as the signed one with the same 64 bits, or a tensor of one int64 element on `device`."""
    if not isinstance(value, Tensor):
        if type(value) is not int or value >> bits:  # fast path for the common case
            value = integer(op, name, value, bits)
        return (value if value < 2**63 else value - 2**64), None
    check_scalar_tensor(op, name, value, torch.int64, device)
    return 0, value


def integer(op: str, name: str, value: int, bits: int) -> int:
    """A plain unsigned integer.

    Raises:
        ValueError: it is not an integer, or needs more bits.
    """
    if not isinstance(value, _INTEGERS):
        try:
            value = operator.index(value)  # NumPy's integers
        except TypeError:
            _refuse(op, name, value, f"an integer, 0 <= {name} < 2^{bits}")
    if not 0 <= value < 2**bits:
        raise ValueError(f"{op} got {name} = {value}; expected 0 <= {name} < 2^{bits}")
    return value


def unsigned(value: int, tensor: Tensor | None) -> int | Tensor:
    """Undo `counter`: the tensor if there is one, or else the unsigned integer."""
    return value % 2**64 if tensor is None else tensor


def check_scalar_tensor(op: str, name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raises: ValueError if `value` is not one element with this dtype on this device, without gradient."""
    if value.numel() != 1 or value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{op} got {name} as a {value.dtype} tensor of {value.numel()} elements on {value.device}; "
            f"expected one {dtype} element on {device}, or a plain number"
        )
    if value.requires_grad:
        raise ValueError(f"{op} has no gradient for {name}; pass {name}.detach()")


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The order in which kernels read a tensor: channels last if it is stored that way, else row-major."""
    channels_last = _CHANNELS_LAST.get(tensor.ndim)
    if not tensor.is_contiguous() and channels_last and tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def empty_like(tensor: Tensor, *_: object) -> Tensor:
    """Memory for a result like `tensor`, in its `memory_format`; also the fake of an op with such a result."""
    return torch.empty_like(tensor, memory_format=memory_format(tensor))


def same_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape have the same memory order.

    The stride of a dimension with one entry is never used, and PyTorch's ops set it inconsistently: channels-last weights of
    a 1x1 convolution have different strides in bfloat16 than their int16 remainder.
    """
    if one.stride() == other.stride() or not one.numel():
        return True
    return all(a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True) if size > 1)


def dense(tensor: Tensor | None, order: torch.memory_format) -> Tensor | None:
    """The tensor itself if a kernel can read it in this order, or else a copy."""
    if tensor is None:
        return None
    if tensor.dtype not in DTYPES:
        tensor = tensor.float()
    return tensor.contiguous(memory_format=order)


def dense_rows(rows: Tensor) -> Tensor:
    """float32 rows, each dense; the stride between them is 0 if all samples share one."""
    rows = rows.float()
    return rows if rows.stride(1) == 1 else rows.contiguous()
