"""What goes wrong through no fault of the program: one sentence for the user and exit code 2, never a traceback."""


class UserError(Exception):
    """Says what was got, what was expected and how to fix it, in one sentence."""


def first_line(error: Exception) -> str:
    """What a library says, without the rest that it says too."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on a GPU or on the CPU, or Python found no more memory."""
    import torch  # here, so that messages need no PyTorch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = (
        "can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
