"""How an op gets its place in `torch.ops.selfnpo`.

`torch.library.custom_op` takes the same schemas, but checks every call in Python. Small ops feel that, and most of all an
optimizer with hundreds of tensors. `triton_op` is for ops made of Triton kernels alone.
"""

from collections.abc import Callable

import torch


def register(
    name: str, schema: str, function: Callable, fake: Callable, setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:  # fmt: skip
    """Make `torch.ops.selfnpo.NAME`, which is also returned.

    Args:
        schema: arguments and results, such as "(Tensor sample, float scale) -> Tensor".
        function: computes the results on every device. It is called below autograd, and torch.compile does not look inside.
        fake: the same results without values, for the meta device and for torch.compile.
        setup_context, backward: the gradient, as `torch.library.register_autograd` takes it; an op may have none.
    """
    op = f"selfnpo::{name}"
    torch.library.define(op, schema)
    torch.library.impl(op, "CompositeExplicitAutograd", function)
    torch.library.register_fake(op, fake)
    if backward is not None:
        torch.library.register_autograd(op, backward, setup_context=setup_context)
    return getattr(torch.ops.selfnpo, name)
