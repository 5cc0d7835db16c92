"""Chooses a PyTorch attention backend for each layer. On a GPU by measurement: the fastest depends on shape and GPU."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from statistics import median
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from selfnpo.errors import UserError, first_line
from selfnpo.models import Family, PretrainedModel

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
NAMES = {None: "own choice", CUDNN: "cudnn", FLASH: "flash", EFFICIENT: "efficient", MATH: "math"}
ORDER = [CUDNN, FLASH, EFFICIENT, MATH]  # fallbacks: if one cannot run a call, the next one might
FUSED = (FLASH, CUDNN, EFFICIENT)
WARM_UPS, ROUNDS = 3, 10
GAIN = 0.03  # share by which another backend must beat PyTorch's own choice
SLEEP = 2_000_000  # GPU cycles, about a millisecond


@dataclass(frozen=True)
class Choice:
    shape: tuple[tuple[int, ...], int]  # shape of the query, and the number of keys
    backend: str
    milliseconds: dict[str, float]  # forward and backward, for every backend that can run this shape
    modules: int  # number of layers with this shape


class Chosen:
    """A diffusers processor that runs with `backend`. Calls that it cannot run go to the backends after it in `ORDER`."""

    def __init__(self, processor: Callable, backend: SDPBackend):
        self.processor, self.backend = processor, backend
        self.backends = ORDER[ORDER.index(backend) :]


@cache
def _class_for(kind: type) -> type[Chosen]:
    """Keeps the name and signature of `kind`, which diffusers reads. torch.compile can read them only from a class."""

    @wraps(kind.__call__)
    def call(self: Chosen, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(self.backends, set_priority=True):
            return self.processor(*args, **kwargs)

    return type(kind.__name__, (Chosen,), {"__call__": call})


@dataclass(frozen=True)
class Call:
    """What decides how long a call of scaled_dot_product_attention takes."""

    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # shapes and strides of query, key and value
    dtype: torch.dtype
    device: torch.device
    options: tuple[tuple[str, Any], ...]

    @property
    def keys(self) -> int:
        return self.layouts[1][0][-2]


class AttentionCalls(TorchFunctionMode):
    """Redirects this thread's calls of scaled_dot_product_attention to `instead`. Inside `instead` it is off.

    Calls from within PyTorch's own functions are not seen: those of nn.MultiheadAttention, and of a checkpointed block that
    the backward pass recomputes.
    """

    def __init__(self, instead: Callable[..., Tensor]):
        super().__init__()
        self.instead = instead

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = self.instead if function is functional.scaled_dot_product_attention else function
        return called(*args, **(kwargs or {}))


def choose_attention(model: ModelMixin, run: Callable[[], object], backends: Sequence[SDPBackend] = FUSED) -> list[Choice]:
    """Give each attention layer of `model` the fastest backend for its shape, if that is not PyTorch's own choice.

    Layers stay unchanged if they pass a mask, if their calls have different winners, or if their processor has weights.
    Calling this again chooses again.

    Args:
        run: one forward pass of `model`; it runs without compilation.
        backends: backends to try in addition to PyTorch's own choice; those that cannot run are left out.
    """
    calls = _record(model, run)
    fastest: dict[Call | None, SDPBackend | None] = {None: None}
    choices = []
    for call, modules in Counter(call for made in calls.values() for call in made if call).items():
        times = measure(call, backends)
        best = min(times, key=times.__getitem__)
        fastest[call] = best if times[best] <= (1 - GAIN) * times[None] else None
        named = {NAMES[backend]: each for backend, each in times.items()}
        query, _ = call.layouts[0]
        choices.append(Choice((query, call.keys), NAMES[fastest[call]], named, modules))
    _assign(calls, fastest)
    return choices


def check_xformers(family: Family) -> None:
    """Raise a UserError, before weights load, where xformers is missing or has no attention for the family."""
    with _xformers():
        if not family.has_xformers:
            raise NotImplementedError(f"diffusers does not support it for {family.name} models")
        import xformers.ops  # noqa: F401


def use_xformers(base: PretrainedModel) -> None:
    """Replace PyTorch's attention by that of xformers."""
    check_xformers(base.family)
    with _xformers():
        base.denoiser.enable_xformers_memory_efficient_attention()


@contextmanager
def _xformers() -> Iterator[None]:
    try:
        yield
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"attention is xformers, which cannot run here: {first_line(error)}; its wheel must be built for torch "
            f"{torch.__version__} and needs a GPU; use --attention sdpa"
        ) from error


def spare_single_keys(model: ModelMixin, run: Callable[[], object]) -> None:
    """The choice on a CPU: the plain formula for layers with a single key, else PyTorch's own choice (flash).

    It measures nothing, so that repeated runs are bit-identical. Softmax over one number is 1, so a single value passes
    through. Flash would spend a kernel on that and give query and key rounding noise instead of zero gradients;
    `torch.compile` simplifies most of the plain formula away.

    Args:
        run: one forward pass of `model`, with at least one sample.
    """
    calls = _record(model, run)
    _assign(calls, {call: MATH if call and call.keys == 1 else None for made in calls.values() for call in made})


def _assign(calls: dict[nn.Module, set["Call | None"]], fastest: dict["Call | None", SDPBackend | None]) -> None:
    """Give every layer its fastest backend, or PyTorch's own choice if its calls have different winners."""
    for module, made in calls.items():
        winners = {fastest[call] for call in made}
        backend = winners.pop() if len(winners) == 1 else None
        processor = module.processor.processor if isinstance(module.processor, Chosen) else module.processor
        module.set_processor(processor if backend is None else _class_for(type(processor))(processor, backend))


def _record(model: ModelMixin, run: Callable[[], object]) -> dict[nn.Module, set[Call | None]]:
    """The attention calls of each layer during `run`; None stands for a call with a mask."""
    calls: dict[nn.Module, set[Call | None]] = {}
    running: list[nn.Module] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if running:
            kind = query.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
            layouts = tuple((tuple(each.shape), each.stride()) for each in (query, key, value))
            call = Call(layouts, dtype, query.device, tuple(options.items())) if attn_mask is None else None
            calls.setdefault(running[-1], set()).add(call)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)

    with ExitStack() as stack:
        for module in model.modules():  # not model.attn_processors, which unconditional UNets and DiTs lack
            if hasattr(module, "set_processor") and not isinstance(module.processor, nn.Module):
                stack.enter_context(module.register_forward_pre_hook(lambda module, args: running.append(module)))
                stack.enter_context(module.register_forward_hook(lambda module, args, output: running.remove(module)))
        stack.enter_context(AttentionCalls(recorded))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        run()
    return calls


def measure(call: Call, backends: Sequence[SDPBackend]) -> dict[SDPBackend | None, float]:
    """Median milliseconds of PyTorch's own choice (None) and of each backend that can run `call`, measured in turns."""
    times: dict[SDPBackend | None, list[float]] = {backend: [] for backend in (None, *backends)}
    generator = torch.Generator(call.device).manual_seed(0)  # leaves the run's own random numbers alone
    inputs = []
    for shape, stride in call.layouts:
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        memory = torch.randn(extent, generator=generator, device=call.device, dtype=call.dtype)
        inputs.append(memory.as_strided(shape, stride).requires_grad_())
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # they only explain why a backend cannot run
        for _ in range(WARM_UPS + ROUNDS):
            for backend in list(times):
                try:
                    times[backend].append(milliseconds(inputs, dict(call.options), backend))
                except RuntimeError:
                    if backend is None:
                        raise
                    del times[backend]
    return {backend: median(measured[WARM_UPS:]) for backend, measured in times.items()}


def milliseconds(inputs: list[Tensor], options: dict[str, Any], backend: SDPBackend | None) -> float:
    """Time of one call, forward and backward. Raises: RuntimeError if `backend` cannot run it."""

    def work() -> None:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            output = functional.scaled_dot_product_attention(*inputs, **options)
        torch.autograd.grad(output, inputs, output.detach())

    if inputs[0].device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)  # launches queue up meanwhile, so that this times the GPU and not the host
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def choice_lines(choices: Sequence[Choice]) -> str:
    """One line per shape."""
    lines = []
    for choice in choices:
        query, keys = choice.shape
        times = {name: f"{value:.3f}" for name, value in choice.milliseconds.items()}
        taken = times.pop(choice.backend)
        others = f" ({', '.join(f'{name} {value}' for name, value in times.items())})" if times else ""
        layers = f"{choice.modules} layer{'s' if choice.modules > 1 else ''}"
        lines.append(f"attention {'x'.join(map(str, query))}, {keys} keys: {choice.backend} {taken} ms{others}, {layers}")
    return "\n".join(lines)
