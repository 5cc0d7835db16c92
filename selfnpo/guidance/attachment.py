"""Attaches a negative model to a pipeline's denoiser and detaches it, beneath all other hooks of the denoiser."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from selfnpo.errors import UserError
from selfnpo.guidance.branches import Branches, Forward, Part
from selfnpo.guidance.calls import Calls, Mode
from selfnpo_kernels import cfg_combine

log = logging.getLogger("selfnpo")

HOOK = "selfnpo_negative"
COMPILE_FIRST = "the denoiser was compiled after guide() was called; compile first, then guide"


class Guidance:
    """A negative model that can be attached to a pipeline and detached from it. Also a context manager. Made by `guide`.

    Args:
        component: name of the denoiser in the pipeline.
        description: describes the negative in messages.
        extrapolation: the guidance scale if the pipeline has no guidance of its own, else None.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        component: str,
        branches: Branches,
        description: str,
        extrapolation: float | None,
        mode: Mode,
    ):
        self.pipe, self.component, self.branches = pipe, component, branches
        self.description, self.extrapolation, self.mode = description, extrapolation, mode
        self.attached = False
        self._lock = threading.RLock()  # one denoiser, one set of weights at a time

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser since `attach` in which the negative computed at least a part."""
        return self._calls.answered

    def __enter__(self) -> "Guidance":
        if not self.attached:
            self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._remove()
        if kind is None:
            self._check_used()

    def attach(self) -> None:
        """Raises: UserError if a negative is already attached to the denoiser."""
        module = getattr(self.pipe, self.component)
        denoiser = unwrap_module(module)
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        if HOOK in registry.hooks:
            kind = type(self.pipe).__name__
            raise UserError(f"the {self.component} of this {kind} already has a negative; detach that one first")
        self._denoiser, self._hook = denoiser, _Hook(self.forward)
        self._calls = Calls(denoiser, self.mode, self.extrapolation is not None)
        self.branches.attach()
        with _beneath_accelerate(denoiser):
            registry.register_hook(self._hook, HOOK)
        self._around_compiled(module)
        denoiser._apply = self._apply
        self.attached = True

    def detach(self) -> None:
        """Leave the pipeline as it was.

        Raises:
            UserError: the negative was never used. It is detached anyway.
        """
        was_attached = self.attached
        self._remove()
        if was_attached:
            self._check_used()

    def _remove(self) -> None:
        if not self.attached:
            return
        self.attached, denoiser, registry = False, self._denoiser, self._denoiser._diffusers_hook
        del denoiser._apply
        if self._compiled is not None:
            owner, name, code = self._compiled
            setattr(owner, name, code)
        with _beneath_accelerate(denoiser):
            registry.remove_hook(HOOK, recurse=False)
            if denoiser.__dict__.get("forward") == MethodType(type(denoiser).forward, denoiser):
                del denoiser.forward
        if not registry.hooks:
            del denoiser._diffusers_hook
        self.branches.detach()

    def _check_used(self) -> None:
        if not self.evaluations:
            raise UserError(
                f"{self.description} was attached to {type(self.pipe).__name__} and never used: the pipeline did not run, "
                "ran without guidance (guidance_scale), or calls its denoiser twice per step (then pass mode='alternate')"
            )

    def _around_compiled(self, module: nn.Module) -> None:
        """Keep compiled code in one piece and run the branches around it."""
        self._compiled = None
        if module is not self._denoiser:
            self._compiled = module, "forward", module.forward
        elif module._compiled_call_impl is not None:
            self._compiled = module, "_compiled_call_impl", module._compiled_call_impl
        if self._compiled is not None:
            owner, name, code = self._compiled
            self._hook.is_inside = True
            setattr(owner, name, lambda *args, **kwargs: self.forward(code, *args, **kwargs))

    def _is_compiled(self) -> bool:
        module, denoiser = getattr(self.pipe, self.component), self._denoiser
        return denoiser._compiled_call_impl is not None or (module is not denoiser and unwrap_module(module) is denoiser)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move the branches' weights along whenever the pipeline or accelerate moves the denoiser."""
        for tensor in self.branches.tensors():
            tensor.data = fn(tensor.data)
        return type(self._denoiser)._apply(self._denoiser, fn, recurse)

    def forward(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output, with the negative's part computed by the negative."""
        if self._compiled is None and self._is_compiled():
            raise UserError(COMPILE_FIRST)
        arguments = self._calls.arguments(*args, **kwargs)
        with self._lock:
            if self._calls.starts_run(arguments):
                self.branches.prepare(next(iter(arguments.values())))
            part = self._calls.part(arguments, self._hook.context.name)
            if part != "none" and self.evaluations == 1:  # a warning, so that it shows by default
                log.warning("%s is active in %s", self.description, type(self.pipe).__name__)
            if self.extrapolation is None:
                return self.branches.evaluate(forward, arguments, part)
            return self._extrapolate(forward, arguments, part)

    def _extrapolate(self, forward: Forward, arguments: dict[str, Any], part: Part) -> Any:
        """(w + 1) positive - w negative, each computed for the whole batch."""
        size = len(next(iter(arguments.values())))
        both = {
            name: torch.cat((value, value)) if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for name, value in arguments.items()
        }
        output = self.branches.evaluate(forward, both, part)
        if isinstance(output, tuple):
            return (cfg_combine(output[0], self.extrapolation), *output[1:])
        return type(output)(sample=cfg_combine(output.sample, self.extrapolation))


class _Context(StateManager):
    """Name of the pipeline's current cache context (such as "cond"), or None if the pipeline sets none."""

    def __init__(self):
        super().__init__(BaseState)
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        self.name = getattr(context, "name", context)  # diffusers before 0.40 passes only the name


class _Hook(ModelHook):
    """Stateful, because only stateful hooks receive cache contexts."""

    _is_stateful = True

    def __init__(self, guided: Callable[..., Any]):
        super().__init__()
        self.guided, self.is_inside = guided, False  # inside compiled code that the branches wrap
        self.context = _Context()

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.is_inside:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._outside(*args, **kwargs)

    @torch.compiler.disable(reason=COMPILE_FIRST)
    def _outside(self, *args: Any, **kwargs: Any) -> Any:
        return self.guided(self.fn_ref.original_forward, *args, **kwargs)


@contextmanager
def _beneath_accelerate(module: nn.Module) -> Iterator[None]:
    """Take off accelerate's wrapper of `forward` for a while: removing it later would also remove whatever wraps it."""
    if not hasattr(module, "_old_forward"):
        yield
        return
    outer, module.forward = module.forward, module._old_forward
    yield
    module._old_forward, module.forward = module.forward, outer
