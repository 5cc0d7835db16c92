"""Loads the compiled module `_C`. Without it everything still works, on the slower reference path."""

from types import ModuleType

_C: ModuleType | None
try:
    from selfnpo_kernels import _C
except ImportError as error:
    _C = None
    failure: str | None = str(error)
else:
    failure = None


def describe() -> str:
    """One line on the state of the extension."""
    if _C is None:
        return f"not available, so the slower reference runs ({failure}); rebuild it with pip install --no-deps ."
    return f"built by {_C.compiler}"
