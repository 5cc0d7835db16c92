"""Properties and measurements of a device: name, memory, time, peak speed, energy and utilisation."""

import os
import platform
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

_REPEATS = 10


def resolve(precision: str) -> str:
    """Replace `auto` with the precision for this machine."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def dtype_of(precision: str) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[resolve(precision)]


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call, until its work on the device is done."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of random matrices, best of ten. Needs 400 MB on a GPU in bf16."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, size, size, generator=generator, device=device, dtype=dtype)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
        for mark in marks:  # the first product runs before the first mark, as a warm-up
            torch.mm(left, right)
            mark.record(torch.cuda.current_stream(device))
        marks[-1].synchronize()
        seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]
    else:
        times = []
        for _ in range(_REPEATS + 1):
            torch.mm(left, right)
            times.append(time.perf_counter())
        seconds = [end - start for start, end in pairwise(times)]
    return 2 * size**3 / min(seconds)


class Meter:
    """Energy and utilisation of a GPU since the meter was created, as the driver reports them, for all processes together.

    Both are None on a CPU or if the driver gives no answer. Nothing here waits for the GPU.
    """

    def __init__(self, device: torch.device):
        self._driver = _driver(device) if device.type == "cuda" else None
        self._busy: list[int] = []  # percent
        self._start = self._ask("nvmlDeviceGetTotalEnergyConsumption")  # mJ since the driver was loaded

    def sample(self) -> None:
        """Read the utilisation; call this now and then."""
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        if rates is not None:
            self._busy.append(rates.gpu)

    def report(self) -> dict[str, float | None]:
        """`energy_wh`, and `gpu_utilisation`: the mean fraction of time in which kernels ran."""
        end = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        known = self._start is not None and end is not None
        return {
            "energy_wh": (end - self._start) / 3.6e6 if known else None,
            "gpu_utilisation": sum(self._busy) / len(self._busy) / 100 if self._busy else None,
        }

    def _ask(self, question: str) -> Any:
        if self._driver is None:
            return None
        nvml, gpu = self._driver
        try:
            return getattr(nvml, question)(gpu)
        except nvml.NVMLError:
            return None


def _driver(device: torch.device) -> tuple[Any, Any] | None:
    """NVML and its handle for a GPU, found by UUID because NVML's numbering ignores CUDA_VISIBLE_DEVICES."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def cpu_name() -> str:
    """Model name, cores and torch threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def total_memory(device: torch.device) -> int:
    """Total bytes of GPU memory, or of main memory for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if not hasattr(os, "sysconf"):  # Windows: unknown, so assume there is enough
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes available to a run. For a CPU this is all memory, because the system uses most of what is free as a cache."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total_memory(device)


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
