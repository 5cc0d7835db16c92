"""Choose the backend that runs an op.

    device      backend
    CPU         cpp, the compiled extension
    CUDA        triton from sm_80 on; the optimizer uses cpp, whose extension contains a CUDA kernel
    any other   reference, plain PyTorch; also for float64 on every device

If a backend cannot run (an older GPU or Triton, an extension built without CUDA), the reference runs, with a warning.

`SELFNPO_BACKEND=reference|cpp|triton` or `with backend(name)` forces a backend for the whole process. If it cannot run, the
op raises an error that says why. With `TRITON_INTERPRET=1` the triton backend also accepts CPU tensors. That is slow, and
meant for tests.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from selfnpo_kernels import extension

BACKENDS = ("reference", "cpp", "triton")

_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block.

    Raises:
        ValueError: no such backend exists. Ops raise RuntimeError if the backend cannot run them.
    """
    global _forced
    before, _forced = _forced, _known(name, "backend()")
    try:
        yield
    finally:
        _forced = before


def backend_for(op: str, tensor: Tensor, cuda: str = "triton") -> str:
    """The backend that runs `op` on `tensor`; `cuda` is the default backend for CUDA tensors.

    Raises:
        RuntimeError: the forced backend cannot run it.
        ValueError: SELFNPO_BACKEND is not a backend.
    """
    forced = _forced or os.environ.get("SELFNPO_BACKEND")
    if forced:
        obstacle = _obstacle(op, _known(forced, "SELFNPO_BACKEND"), tensor, cuda)
        if obstacle:
            raise RuntimeError(f"{op} cannot run on the forced backend {forced!r}: {obstacle}")
        return forced
    preferred = {"cpu": "cpp", "cuda": cuda}.get(tensor.device.type, "reference")
    if tensor.dtype not in extension.DTYPES:
        return "reference"
    obstacle = _obstacle(op, preferred, tensor, cuda)
    if obstacle:
        warnings.warn(f"{op} runs on the slower reference: {obstacle}", RuntimeWarning, stacklevel=4)
        return "reference"
    return preferred


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} got {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def _obstacle(op: str, name: str, tensor: Tensor, cuda: str) -> str | None:
    """Why a backend cannot run an op on a tensor, or None if it can."""
    if name == "reference":
        return None
    if tensor.dtype not in extension.DTYPES:
        return f"it computes in float32 on {', '.join(str(dtype)[6:] for dtype in extension.DTYPES)}; got {tensor.dtype}"
    device = tensor.device.type
    if name == "cpp":
        on_gpu = device == "cuda" and cuda == "cpp"
        if extension._C is None or (on_gpu and not extension._C.cuda_architectures):
            return f"the extension is {extension.state()}"
        if on_gpu:
            return _age(tensor.device)
        return (
            None if device == "cpu" else f"it runs on the CPU, but the tensor is on {tensor.device}; use triton or reference"
        )
    if cuda != "triton":
        return "it has no Triton kernel; use cpp or reference"
    if triton_failure():
        return triton_failure()
    if device == "cuda":
        return _age(tensor.device)
    if device == "cpu" and _interpreting():
        return None
    return (
        f"it runs on CUDA devices, but the tensor is on {tensor.device} (TRITON_INTERPRET=1 runs its interpreter on the CPU)"
    )


def _age(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need a GPU with sm_80 or later, but this one has sm_{major}{minor}"


# Newer names in triton.language that the kernels use, and the oldest tested release.
TRITON_NAMES = ("add", "cast", "div_rn", "join", "sqrt_rn", "static_range")
TRITON_FLOOR = "3.6"


@cache
def triton_failure() -> str | None:
    """Why Triton cannot run the kernels, or None."""
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    remedy = f"pip install 'triton>={TRITON_FLOOR}'"
    missing = [f"triton.language.{name}" for name in TRITON_NAMES if not hasattr(tl, name)]
    if missing:
        return f"Triton {triton.__version__} has no {missing[0]}; install a tested release with {remedy}"
    version, floor = (tuple(map(int, each.split(".")[:2])) for each in (triton.__version__, TRITON_FLOOR))
    if version < floor:
        return f"Triton {triton.__version__} is too old; run {remedy}"
    return None


def _interpreting() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def summary() -> str:
    """One line on which backend runs where."""
    gpu = "reference" if triton_failure() else "triton"
    cpu = "reference" if extension._C is None else "cpp"
    forced = _forced or os.environ.get("SELFNPO_BACKEND")
    note = f"forced to {forced}" if forced else f"cpu {cpu}, cuda {gpu}"
    return note + ("" if torch.cuda.is_available() else " (no CUDA device here)")
