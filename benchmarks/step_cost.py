"""What a training step costs besides time: launches, values read by the host, memory."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from selfnpo.training.capture import READS

LAUNCHES = {
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync",
    "cudaMemsetAsync",
}  # fmt: skip
# Operators that may do nothing, or only allocate.
IDLE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "to", "contiguous",
    "reshape", "resolve_conj", "resolve_neg", "dropout", "_unsafe_view", "lift_fresh", "detach_", "as_strided_", "item",
    "is_nonzero",
}  # fmt: skip


@dataclass(frozen=True)
class StepCost:
    launches: int  # kernels, copies and graphs on a GPU; operators and compiled loops on a CPU
    host_reads: int  # values that Python reads from tensors; on a GPU, from tensors there
    peak_bytes: int  # on a GPU in total; on a CPU only what the step allocates


def step_cost(step: Callable[[], object], device: torch.device) -> StepCost:
    """The cost of one warmed-up step."""
    return _on_gpu(step) if device.type == "cuda" else _on_cpu(step)


def held_bytes() -> int:
    """Bytes of all live tensors in host memory."""
    gc.collect()
    tensors = (
        each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu"
    )
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def _on_gpu(step: Callable[[], object]) -> StepCost:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reads = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    peak = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return StepCost(sum(event.name in LAUNCHES for event in profiler.events()), reads, peak)


def _on_cpu(step: Callable[[], object]) -> StepCost:
    lists: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> list:  # the profiler does not see tolist
        lists.append(1)
        return tolist(tensor)

    with (
        patch.object(torch.Tensor, "tolist", counted),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        step()
    tops = [event for event in profiler.events() if event.cpu_parent is None]
    in_use = peak = 0
    memory = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return StepCost(sum(map(_launches, tops)), len(lists) + sum(map(_reads, tops)), peak)


def _launches(event: FunctionEvent) -> int:
    """Counts the innermost operators that do some work."""
    if event.name.startswith("selfnpo::"):
        return 1
    return sum(map(_launches, event.cpu_children)) or int(_computes(event.name))


def _reads(event: FunctionEvent) -> int:
    """Counts reads, except inside a fused op or an optimizer, whose counters are on the host anyway."""
    if event.name.startswith(("selfnpo::", "Optimizer.step")):
        return 0
    return int(event.name.removeprefix("aten::") in READS) + sum(map(_reads, event.cpu_children))


@cache
def _computes(name: str) -> bool:
    if name.startswith("graph_"):  # a loop that Inductor compiled
        return True
    space, _, name = name.partition("::")
    if space not in ("aten", "mkldnn") or name in IDLE | READS:
        return False
    packet = getattr(getattr(torch.ops, space), name, None)
    return packet is None or not any(getattr(packet, overload).is_view for overload in packet.overloads())
