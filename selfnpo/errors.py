"""Errors that the user can fix: reported in one sentence with exit code 2, without a traceback."""


class UserError(Exception):
    """One sentence: what was given, what was expected, and how to fix it."""


def first_line(error: Exception) -> str:
    """The first line of a library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch (on a GPU or a CPU) or Python ran out of memory."""
    import torch  # imported here so that messages do not load PyTorch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = (
        "can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
