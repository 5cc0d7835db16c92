"""A training step as one CUDA graph: recorded once, then replayed by a single call.

A graph repeats the kernels that it saw, at the addresses that it saw. So a step may be captured if it does the same every
time, on memory that stays where it is, without asking the device for a value and without numbers that the host draws or
counts. `Recorder` watches ordinary steps for that, on any device, and `difference` says what stands in the way.
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
WITHOUT_DROPOUT = ("_scaled_dot_product", "_efficient_attention", "_flash_attention", "_cudnn_attention")  # networks are
# evaluated without it, and nothing else in them is random
WARM_UP = 3  # steps on the graph's stream before it is captured: libraries load, autotuning ends

Step = Callable[[], tuple[Tensor, ...]]


class Recorder(TorchDispatchMode):
    """What a step does: operations, their numbers, and the memory that they find already there."""

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
            self.faults.append(f"{name} makes a tensor from values of the host")
        if torch.Tag.nondeterministic_seeded in op.tags and not name.startswith(WITHOUT_DROPOUT):
            self.faults.append(f"{name} draws random numbers that the host counts")
        if name in ("copy_", "_to_copy"):
            places = {tensor.device.type for tensor in tensors}
            if kwargs.get("device") is not None:
                places.add(torch.device(kwargs["device"]).type)
            if len(places) > 1:
                self.faults.append(f"{name} copies between {' and '.join(sorted(places))}")
        self.events.append((name, tuple(map(self._trace, leaves))))
        result = op(*args, **kwargs)
        found = {_storage(tensor) for tensor in tensors}
        # Storages that were there before the step live on, so none of theirs is taken for a new one.
        self._made |= {_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)} - found
        return result

    def _trace(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return "" if isinstance(leaf, torch.ScriptObject) else repr(leaf)  # one that marks time for profilers
        place = "made here" if _storage(leaf) in self._made else leaf.data_ptr()
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, place


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def difference(first: Recorder, second: Recorder) -> str:
    """Why the step that was watched twice cannot be captured; empty where it can."""
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
    """Calls a step. After two that are watched and a few on the graph's stream it replays their graph; where that is not
    possible it says so, once, and goes on with ordinary steps."""

    def __init__(self, step: Step, clear: Callable[[], object]):
        """`clear` throws away the gradients of a step that was not finished."""
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
            # The mode sees through compiled code no more than through a kernel.
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
    """Run on `stream`, between what was asked for before and what will be asked for after."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = step()
    torch.cuda.current_stream().wait_stream(stream)
    return outputs


def capture(step: Step, pool: Any, stream: "torch.cuda.Stream") -> Step:
    """A function that does what `step` does by replaying a graph of it; capturing does not execute it.

    Args:
        step: has run on `stream` before, so that whatever it compiles, loads or allocates once is there.
        pool: `torch.cuda.graph_pool_handle()`; graphs with one pool share their memory and must not run at once.
    """
    graph = torch.cuda.CUDAGraph()
    # Meanwhile another thread may wait for a copy and write it to a checkpoint.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        outputs = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return tuple(output.clone() for output in outputs)  # the next replay writes to the same memory

    return replay
