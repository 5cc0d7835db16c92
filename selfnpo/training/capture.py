"""A training step as one CUDA graph: recorded once, then replayed by a single call.

A graph repeats the kernels it recorded, at the addresses it recorded. So a step can be captured only if it does the same
work every time, on memory that does not move, reads no value from the device, and uses no numbers that the host draws or
counts. `Recorder` watches ordinary steps for this, on any device, and `difference` says what stands in the way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfnpo.errors import first_line

READS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
FROM_HOST = {"lift_fresh", "lift_fresh_copy"}
WITHOUT_DROPOUT = ("_scaled_dot_product", "_efficient_attention", "_flash_attention", "_cudnn_attention")  # networks run
# without it, and nothing else in them is random
WARM_UP = 3  # steps on the graph's stream before capture, in which libraries load and autotuning finishes

Step = Callable[[], tuple[Tensor, ...]]


class Recorder(TorchDispatchMode):
    """Records what a step does: operations, their arguments, and which memory existed before the step."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, tuple[Any, ...]]] = []
        self.faults: list[str] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = op.overloadpacket.__name__, kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name in READS:
            self.faults.append(f"{name} reads a value from the device")
        if name in FROM_HOST:
            self.faults.append(f"{name} makes a tensor from values on the host")
        if torch.Tag.nondeterministic_seeded in op.tags and not name.startswith(WITHOUT_DROPOUT):
            self.faults.append(f"{name} draws random numbers from a generator that the host advances")
        if name in ("copy_", "_to_copy"):
            places = {tensor.device.type for tensor in tensors}
            if kwargs.get("device") is not None:
                places.add(torch.device(kwargs["device"]).type)
            if len(places) > 1:
                self.faults.append(f"{name} copies between {' and '.join(sorted(places))}")
        self.events.append((name, tuple(map(self._trace, leaves))))
        result = op(*args, **kwargs)
        found = {_storage(tensor) for tensor in tensors}
        # Storages from before the step stay alive, so a new storage cannot have the address of one of them.
        self._made |= {_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)} - found
        return result

    def _trace(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return "" if isinstance(leaf, torch.ScriptObject) else repr(leaf)  # marks a time span for profilers
        place = "made here" if _storage(leaf) in self._made else leaf.data_ptr()
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, place


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def difference(first: Recorder, second: Recorder) -> str:
    """Why the step that was recorded twice cannot be captured; empty if it can."""
    for fault in (*first.faults, *second.faults):
        return fault
    for (name, before), (other, now) in zip(first.events, second.events, strict=False):
        if name != other or len(before) != len(now):
            return f"{name} in one step is {other} in the next"
        for one, two in zip(before, now, strict=True):
            if one != two:
                moved = isinstance(one, tuple) and isinstance(two, tuple) and one[:3] == two[:3]
                return f"{name} {'finds its operand at another address' if moved else f'takes {one}, then {two}'}"
    if len(first.events) != len(second.events):
        return f"one step has {len(first.events)} operations, the next {len(second.events)}"
    return ""


class Replayed:
    """Runs a step. After two recorded steps and a few on the graph's stream it captures the step and replays the graph. If
    that is not possible, it says so once and continues with ordinary steps."""

    def __init__(self, step: Step, clear: Callable[[], object]):
        """`clear` discards the gradients of an unfinished step."""
        self.step, self.clear = step, clear
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.watched: list[Recorder] = []
        self.warm = 0
        self.replay: Step | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        if self.replay:
            return self.replay()
        if len(self.watched) < 2:
            self.watched.append(Recorder())
            # The recorder cannot see into compiled code, so the step runs eagerly.
            with torch.compiler.set_stance("force_eager"), self.watched[-1]:
                return self.step()
        if reason := self.warm == 0 and difference(*self.watched):
            return self._give_up(reason)
        if self.warm < WARM_UP:
            self.warm += 1
            return on_stream(self.stream, self.step)
        try:
            self.replay = capture(self.step, self.pool, self.stream)
        except RuntimeError as error:
            self.clear()
            return self._give_up(first_line(error))
        return self.replay()

    def _give_up(self, reason: str) -> tuple[Tensor, ...]:
        print(f"steps are not captured in a CUDA graph: {reason}")
        self.replay = self.step
        return self.replay()


def on_stream(stream: "torch.cuda.Stream", step: Step) -> tuple[Tensor, ...]:
    """Run `step` on `stream`, ordered after earlier work and before later work on the current stream."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = step()
    torch.cuda.current_stream().wait_stream(stream)
    return outputs


def capture(step: Step, pool: Any, stream: "torch.cuda.Stream") -> Step:
    """A function that does the same as `step` by replaying a graph of it. Capturing does not execute the step.

    Args:
        step: must have run on `stream` before, so that everything it compiles, loads or allocates once is in place.
        pool: `torch.cuda.graph_pool_handle()`; graphs of the same pool share memory and must not run at the same time.
    """
    graph = torch.cuda.CUDAGraph()
    # Thread-local, because another thread may be writing a checkpoint meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        outputs = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return tuple(output.clone() for output in outputs)  # the next replay overwrites this memory

    return replay
