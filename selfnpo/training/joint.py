"""Reference and student in one forward pass, where both are adapters on the same frozen weights.

A frozen layer computes the rows of both at once. Everything else is applied to each half by itself, to the reference's
without gradients. So the backward pass knows the student only, which in an ordinary batch of both it would not.
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

GRADIENTS = {  # of a frozen layer's input
    functional.linear: lambda shape, weight, gradient: gradient @ weight,
    functional.conv1d: nn.grad.conv1d_input,
    functional.conv2d: nn.grad.conv2d_input,
    functional.conv3d: nn.grad.conv3d_input,
}
SHARED = (int, float, torch.Size, torch.dtype, torch.device)  # results that are equal for both halves


class Pair(torch.Tensor):
    """Two tensors of one shape, to compute with as with one: its attributes are the student's; tensors that are no pairs are
    shared by both halves, and are not written to.

    Raises:
        ValueError: the shapes differ.
        TypeError: an operation would take the two for one tensor, or write both into one.
        RuntimeError: an operation would lose the student's gradient.
    """

    reference: Tensor  # never requires grad
    student: Tensor

    @staticmethod
    def __new__(cls, reference: Tensor, student: Tensor) -> "Pair":
        return torch.Tensor._make_wrapper_subclass(cls, student.shape, dtype=student.dtype, device=student.device)

    def __init__(self, reference: Tensor, student: Tensor):
        if reference.shape != student.shape:
            raise ValueError(f"a pair has one shape, got {tuple(reference.shape)} and {tuple(student.shape)}")
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
        raise TypeError(f"{function} takes a pair for one tensor")


def pair(reference: Any, student: Any) -> Any:
    """Two equal structures of dicts, lists and tuples as one, with pairs in the place of tensors; other leaves are the
    student's."""
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
            raise RuntimeError(
                "a pair came to a custom autograd function or to no_grad, where the student loses its gradient"
            )
        return getattr(value, name)
    if isinstance(value, dict):
        return {key: _half(name, each) for key, each in value.items()}
    return type(value)([_half(name, each) for each in value]) if isinstance(value, (list, tuple)) else value


def _recomputes() -> bool:
    """In the backward pass a checkpointed block runs again, of which the student's half is enough: it stands for both."""
    return torch._C._current_graph_task_id() != -1


def _is_frozen_layer(function: Callable, args: Any, kwargs: Any) -> bool:
    if function not in GRADIENTS or kwargs or any(isinstance(each, (Pair, str)) for each in args[1:]):
        return False
    is_frozen = not any(isinstance(each, Tensor) and each.requires_grad for each in args[1:])
    return is_frozen and args[0].ndim >= args[1].ndim  # which it has with a batch


class _FrozenLayer(torch.autograd.Function):
    """Keeps no activations: the gradient of its input follows from the weight alone."""

    @staticmethod
    def forward(ctx: Any, reference: Tensor, student: Tensor, function: Callable, weight: Tensor, options: tuple) -> tuple:
        # The weight is an attribute: after a saved tensor a checkpointed block would compute the layer again.
        ctx.function, ctx.shape, ctx.weight, ctx.options = function, student.shape, weight, options[1:]
        if _recomputes():
            return None, function(student, weight, *options)
        output = function(torch.cat((reference, student)), weight, *options)
        reference, student = (half.data for half in output.chunk(2))  # views could not be changed in place
        ctx.mark_non_differentiable(reference)
        ctx.set_materialize_grads(False)
        return reference, student

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, gradient: Tensor) -> tuple:
        weight = ctx.weight.to(gradient.dtype)  # under autocast it may have another one
        return None, GRADIENTS[ctx.function](ctx.shape, weight, gradient, *ctx.options), None, None, None


@contextmanager
def joint(layers: Iterable[BaseTunerLayer], student_adapter: str, reference_adapter: str | None) -> Iterator[None]:
    """Within, peft's `layers`, linear ones and convolutions, take pairs, whichever adapters are on. Where blocks are
    checkpointed, the backward pass lies within, too. The student's adapters require grad from here on."""
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
    """`output` of the base's layer with the offset of an adapter: the arithmetic of peft's own layers, without dropout."""
    if adapter is None:
        return output
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    return (output + up(down(layer._cast_input_dtype(x, down.weight.dtype))) * layer.scaling[adapter]).to(output.dtype)
