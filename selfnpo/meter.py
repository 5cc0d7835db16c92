"""What a run costs: FLOPs counted on the meta device, hours, energy, utilisation.

FLOPs are two per multiply-add, of matrix products, convolutions and attention, with what gradient checkpointing computes
again. Elementwise operations and the optimizer are not counted.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selfnpo.config import TrainConfig
from selfnpo.memory import call_on_meta, make_trainable
from selfnpo.models import Source

PEAKS = {"A100": 312e12, "H100": 990e12, "H200": 990e12}  # FLOP/s of dense bf16 products, from the data sheets
# Share of these that a prediction assumes: the record for a UNet in training, Stable Diffusion v2's in MLPerf Training v4.0,
# with 127.5 samples/s on an H100, 307 TFLOP/s.
EFFICIENCY = 0.31
_REPEATS = 10


@dataclass(frozen=True)
class Flops:
    """Per sample."""

    forward: int  # one forward pass of the denoiser
    training: int  # forward and backward pass of the student


def count_flops(config: TrainConfig, source: Source) -> Flops:
    """What the networks of a run compute, counted without weights.

    Raises:
        UserError: a size that the model cannot have, or a LoRA that does not fit its layers.
    """
    model = source.empty_denoiser()
    shape = source.family.sample_shape(source.config, source.scale, config)

    def call() -> Tensor:
        return call_on_meta(source, model, shape, 1, config)

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        call()
    make_trainable(config, source, model)
    with FlopCounterMode(display=False) as training:
        call().sum().backward()
    return Flops(forward.get_total_flops(), training.get_total_flops())


def step_flops(config: TrainConfig, flops: Flops, evaluations_per_sample: float) -> float:
    """FLOPs of one optimizer step, with that many guided evaluations of the reference per sample."""
    branches = 1 if config.rollout_guidance_scale in (0, 1) else 2
    return config.total_batch_size * (flops.training + evaluations_per_sample * branches * flops.forward)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, to its end on the device."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of random matrices, the best of ten. A GPU needs 400 MB for it in bf16."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, size, size, generator=generator, device=device, dtype=dtype)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
        for mark in marks:  # the first product, before the first mark, warms up
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
    """Energy and utilisation of a GPU since the meter was made, as its driver reports them, other processes' included.

    Where the driver does not answer, and on a CPU, they are None. Nothing here waits for the GPU.
    """

    def __init__(self, device: torch.device):
        self._driver = _driver(device) if device.type == "cuda" else None
        self._busy: list[int] = []  # per cent
        self._start = self._ask("nvmlDeviceGetTotalEnergyConsumption")  # mJ since the driver was loaded

    def sample(self) -> None:
        """Read the utilisation, now and then."""
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        if rates is not None:
            self._busy.append(rates.gpu)

    def report(self) -> dict[str, float | None]:
        """`energy_wh`, and `gpu_utilisation` as the mean share of time in which kernels ran."""
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
    """NVML and its handle of a GPU; by its UUID, because NVML's numbers know no CUDA_VISIBLE_DEVICES."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def cost_of_compute(device: torch.device, seconds: float, flops_done: float, peak: float) -> dict[str, float]:
    """Hours, and the speed beside `peak`, the FLOP/s of `matmul_peak`."""
    achieved = flops_done / seconds
    return {
        "gpu_hours" if device.type == "cuda" else "cpu_hours": seconds / 3600,
        "tflops": achieved / 1e12,
        "fraction_of_matmul_peak": achieved / peak,
        "matmul_peak_tflops": peak / 1e12,
    }


def predicted(run_flops: float) -> dict[str, float]:
    """Hours that a run of that many FLOPs would take on some GPUs at the assumed EFFICIENCY: predicted, not measured."""
    return {gpu: run_flops / (EFFICIENCY * peak) / 3600 for gpu, peak in PEAKS.items()}


def describe(cost: dict[str, Any]) -> str:
    """The closing lines of a run.

    Args:
        cost: what `cost_of_compute` and `Meter.report` return, `samples_per_second`, and where no GPU was at hand
            `predicted_gpu_hours`, which `predicted` returns.
    """
    kind = "GPU" if "gpu_hours" in cost else "CPU"
    share = f"{_percent(cost['fraction_of_matmul_peak'])} of the matmul peak measured in this run"
    parts = [
        _duration(cost[f"{kind.lower()}_hours"], kind),
        f"{digits(cost['samples_per_second'])} samples/s",
        f"{_with_prefix(cost['tflops'] * 1e12, 'FLOP/s')} ({share})",
    ]
    if cost["energy_wh"] is not None:
        parts.append(_with_prefix(cost["energy_wh"], "Wh"))
    if cost["gpu_utilisation"] is not None:
        parts.append(f"GPU busy {_percent(cost['gpu_utilisation'])}")
    lines = [", ".join(parts)]
    if cost.get("predicted_gpu_hours"):
        hours = (f"{_duration(hours, 'GPU')} on an {gpu}" for gpu, hours in cost["predicted_gpu_hours"].items())
        lines.append(f"predicted at {_percent(EFFICIENCY)} of peak: {', '.join(hours)}")
    return "\n".join(lines)


def digits(value: float, count: int = 3) -> str:
    """That many significant digits, never with an exponent."""
    return f"{Decimal(f'{value:.{count}g}'):f}"


def _percent(share: float) -> str:
    return f"{digits(100 * share, 2)} %"


def _duration(hours: float, kind: str) -> str:
    return f"{digits(hours)} {kind}-hours" if hours >= 0.001 else f"{digits(hours * 3600)} {kind}-seconds"


def _with_prefix(value: float, unit: str) -> str:
    """With the prefix, from milli to tera, that leaves a number from 1 to 1000."""
    power = min(max(math.floor(math.log10(value) / 3), -1), 4) if value else 0
    return f"{digits(value / 1000**power)} {('m', '', 'k', 'M', 'G', 'T')[power + 1]}{unit}"
