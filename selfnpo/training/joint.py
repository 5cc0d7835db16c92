"""Reference and student in one forward pass, for two sets of adapters on the same frozen weights.

A frozen layer computes the rows of both at once. Everything else is applied to each half separately, without gradients for
the reference. So only the student has a backward pass; in an ordinary joint batch the reference would have one too.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

GRADIENTS = {  # of the input of a frozen layer
    functional.linear: lambda shape, weight, gradient: gradient @ weight,
    functional.conv1d: nn.grad.conv1d_input,
    functional.conv2d: nn.grad.conv2d_input,
    functional.conv3d: nn.grad.conv3d_input,
}
SHARED = (int, float, torch.Size, torch.dtype, torch.device)  # results that are equal for both halves


class Pair(torch.Tensor):
    """Two tensors of the same shape that compute like one. Its attributes are the student's. Ordinary tensors are shared by
    both halves and must not be written to.

    Raises:
        ValueError: the shapes differ.
        TypeError: an operation would treat the pair as one tensor, or write both halves into one.
        RuntimeError: an operation would lose the student's gradient.
    """

    reference: Tensor  # never requires grad
    student: Tensor

    @staticmethod
    def __new__(cls, reference: Tensor, student: Tensor) -> "Pair":
        return torch.Tensor._make_wrapper_subclass(cls, student.shape, dtype=student.dtype, device=student.device)

    def __init__(self, reference: Tensor, student: Tensor):
        if reference.shape != student.shape:
            raise ValueError(f"a pair needs one shape, got {tuple(reference.shape)} and {tuple(student.shape)}")
        self.reference, self.student = reference.detach() if reference.requires_grad else reference, student

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind())

    def register_hook(self, hook: Callable) -> Any:
        return self.student.register_hook(hook)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs, first = function.__name__, kwargs or {}, args[0] if args else None
        if isinstance(first, Pair) and _is_frozen_layer(function, args, kwargs):
            reference, student = _FrozenLayer.apply(first.reference, first.student, function, args[1], args[2:])
            return Pair(student if reference is None else reference, student)
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if "out" in kwargs or (writes and not isinstance(first, Pair)):
            raise TypeError(f"{name} would write both halves of a pair into one tensor")
        student = function(*_half("student", args), **_half("student", kwargs))
        if isinstance(student, SHARED):
            return student
        if _recomputes():
            return pair(student, student)
        with torch.no_grad():
            return pair(function(*_half("reference", args), **_half("reference", kwargs)), student)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{function} would treat a pair as one tensor")


def pair(reference: Any, student: Any) -> Any:
    """Merge two equal structures of dicts, lists and tuples into one that has pairs in place of tensors. Other leaves come
    from the student."""
    if isinstance(student, Tensor):
        return Pair(reference, student)
    if isinstance(student, dict):
        return {name: pair(reference[name], each) for name, each in student.items()}
    if isinstance(student, (list, tuple)):
        return type(student)([pair(*each) for each in zip(reference, student, strict=True)])
    return student


def _half(name: str, value: Any) -> Any:
    if isinstance(value, Pair):
        if value.student.requires_grad and name == "student" and not torch.is_grad_enabled():
            raise RuntimeError("a pair reached a custom autograd function or no_grad, where the student loses its gradient")
        return getattr(value, name)
    if isinstance(value, dict):
        return {key: _half(name, each) for key, each in value.items()}
    return type(value)([_half(name, each) for each in value]) if isinstance(value, (list, tuple)) else value


def _recomputes() -> bool:
    """Whether the backward pass is recomputing a checkpointed block. Then only the student's half is needed, for both."""
    return torch._C._current_graph_task_id() != -1


def _is_frozen_layer(function: Callable, args: Any, kwargs: Any) -> bool:
    if function not in GRADIENTS or kwargs or any(isinstance(each, (Pair, str)) for each in args[1:]):
        return False
    is_frozen = not any(isinstance(each, Tensor) and each.requires_grad for each in args[1:])
    return is_frozen and args[0].ndim >= args[1].ndim  # so the input has a batch dimension


class _FrozenLayer(torch.autograd.Function):
    """Saves no activations: the gradient of its input needs only the weight."""

    @staticmethod
    def forward(ctx: Any, reference: Tensor, student: Tensor, function: Callable, weight: Tensor, options: tuple) -> tuple:
        # The weight is an attribute: saving it as a tensor would make a checkpointed block recompute the layer.
        ctx.function, ctx.shape, ctx.weight, ctx.options = function, student.shape, weight, options[1:]
        if _recomputes():
            return None, function(student, weight, *options)
        output = function(torch.cat((reference, student)), weight, *options)
        reference, student = (half.data for half in output.chunk(2))  # views could not be modified in place
        ctx.mark_non_differentiable(reference)
        ctx.set_materialize_grads(False)
        return reference, student

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, gradient: Tensor) -> tuple:
        weight = ctx.weight.to(gradient.dtype)  # autocast may have used another dtype
        return None, GRADIENTS[ctx.function](ctx.shape, weight, gradient, *ctx.options), None, None, None


@contextmanager
def joint(layers: Iterable[BaseTunerLayer], student_adapter: str, reference_adapter: str | None) -> Iterator[None]:
    """Inside this context peft's `layers` (linear or convolutional) take pairs, whichever adapters are on. If blocks are
    checkpointed, the backward pass must run inside it too. From here on the student's adapters require gradients."""
    layers = list(layers)
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B):
            part[student_adapter].requires_grad_(True)
        layer.forward = partial(_forward, layer, student_adapter, reference_adapter)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: BaseTunerLayer, student_adapter: str, reference_adapter: str | None, x: Tensor) -> Pair:
    x = x if isinstance(x, Pair) else Pair(x, x)
    output = layer.base_layer(x)
    student = reference = _adapted(layer, student_adapter, x.student, output.student)
    if not _recomputes():
        with torch.no_grad():
            reference = _adapted(layer, reference_adapter, x.reference, output.reference)
    return Pair(reference, student)


def _adapted(layer: BaseTunerLayer, adapter: str | None, x: Tensor, output: Tensor) -> Tensor:
    """`output` of the base layer plus an adapter's offset, computed as peft's own layers do, without dropout."""
    if adapter is None:
        return output
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    return (output + up(down(layer._cast_input_dtype(x, down.weight.dtype))) * layer.scaling[adapter]).to(output.dtype)
