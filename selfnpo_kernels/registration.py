"""Register ops in `torch.ops.selfnpo`.

`torch.library.custom_op` accepts the same schemas, but checks every call in Python. That is slow for small ops, and most of
all for an optimizer with hundreds of tensors. `triton_op` is for ops that consist only of Triton kernels.
"""

from collections.abc import Callable

import torch


def register(
    name: str, schema: str, function: Callable, fake: Callable, setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:  # fmt: skip
    """Register `torch.ops.selfnpo.NAME` and return it.

    Args:
        schema: arguments and results, such as "(Tensor sample, float scale) -> Tensor".
        function: computes the results on every device. It runs below autograd, and torch.compile does not trace it.
        fake: returns the same results without values, for the meta device and for torch.compile.
        setup_context, backward: the gradient, as for `torch.library.register_autograd`; optional.
    """
    op = f"selfnpo::{name}"
    torch.library.define(op, schema)
    torch.library.impl(op, "CompositeExplicitAutograd", function)
    torch.library.register_fake(op, fake)
    if backward is not None:
        torch.library.register_autograd(op, backward, setup_context=setup_context)
    return getattr(torch.ops.selfnpo, name)
