"""Load the compiled module `_C` and describe tensors to it. Without it everything works, but slower."""

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

# In the order of csrc/cpu/kernel.h. The kernels always compute in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def typed(tensor: Tensor | None) -> tuple[int, int]:
    """(address, dtype code) of a dense tensor; the address is 0 for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES.index(tensor.dtype))


def _remedy() -> str:
    folder = Path(__file__).parents[1]
    if (folder / "CMakeLists.txt").is_file() and (folder / "setup.py").is_file():
        return (
            f"Python uses the source code in {folder}, where the extension is not built: run pip install -e . there, or "
            "start Python in another folder to use the installed package"
        )
    return "to build it, run pip install --no-deps . in the source folder; this needs a C++ compiler"


def state() -> str:
    """One line on whether the extension is available, and how it was built."""
    if _C is None:
        return f"not available ({failure}); {_remedy()}"
    cuda = f"CUDA by {_C.cuda_architectures}" if _C.cuda_architectures else "no CUDA: built without nvcc"
    return f"built by {_C.compiler}, {cuda}"
