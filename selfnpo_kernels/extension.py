"""Loads the compiled module `_C`, and says tensors in its terms. Without it everything still works, only slower."""

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

_C: ModuleType | None
failure = ""
try:
    import selfnpo_kernels._C as _C
except ImportError as error:
    _C, failure = None, str(error)

# In the order of csrc/cpu/kernel.h. The kernels compute in float32 whatever they read.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def typed(tensor: Tensor | None) -> tuple[int, int]:
    """(address, dtype code) of a dense tensor; address 0 where it is absent."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES.index(tensor.dtype))


def _remedy() -> str:
    folder = Path(__file__).parents[1]
    if (folder / "CMakeLists.txt").is_file() and (folder / "setup.py").is_file():
        return (
            f"Python runs the source code in {folder}, where nothing is built: run pip install -e . there, or start Python "
            "in another folder to use what pip install . installed"
        )
    return "to get it, run pip install --no-deps . in the source code, with a C++ compiler"


def state() -> str:
    """One line: whether the extension is there, and what it was built by."""
    if _C is None:
        return f"not available ({failure}); {_remedy()}"
    cuda = f"CUDA by {_C.cuda_architectures}" if _C.cuda_architectures else "no CUDA: built without nvcc"
    return f"built by {_C.compiler}, {cuda}"
