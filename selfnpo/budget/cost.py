"""The cost of a run: FLOPs counted on the meta device, predicted hours, and the closing lines that report them.

A multiply-add counts as two FLOPs. Matrix products, convolutions and attention are counted, including what gradient
checkpointing recomputes. Elementwise operations and the optimizer are not.
"""

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selfnpo.budget.meta import call_on_meta, make_trainable
from selfnpo.config import TrainConfig
from selfnpo.models import Source

PEAKS = {"A100": 312e12, "H100": 990e12, "H200": 990e12}  # FLOP/s of dense bf16 products, from the data sheets
# Fraction of these peaks that predictions assume. It is the record for training a UNet: Stable Diffusion v2 in MLPerf
# Training v4.0, with 127.5 samples/s on an H100, 307 TFLOP/s.
EFFICIENCY = 0.31
FILLS_A_GPU = 1e12  # minimum FLOPs of a step for that assumption; smaller steps wait for kernel launches


@dataclass(frozen=True)
class Flops:
    """Per sample."""

    forward: int  # one forward pass of the denoiser
    training: int  # forward and backward pass of the student


def count_flops(config: TrainConfig, source: Source) -> Flops:
    """Count the FLOPs of a run's networks, without loading weights.

    Raises:
        UserError: the model does not support the size, or a LoRA does not fit its layers.
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
    """FLOPs of one optimizer step, with this many guided evaluations of the reference per sample."""
    branches = 1 if config.rollout_guidance_scale in (0, 1) else 2
    return config.total_batch_size * (flops.training + evaluations_per_sample * branches * flops.forward)


def cost_of_compute(device: torch.device, seconds: float, flops_done: float, peak: float | None = None) -> dict[str, float]:
    """Hours and speed; on a GPU also relative to `peak`, the FLOP/s from `matmul_peak`."""
    achieved = flops_done / seconds
    found = {"gpu_hours" if device.type == "cuda" else "cpu_hours": seconds / 3600, "tflops": achieved / 1e12}
    if peak is not None:
        found |= {"fraction_of_matmul_peak": achieved / peak, "matmul_peak_tflops": peak / 1e12}
    return found


def predicted(run_flops: float) -> dict[str, float]:
    """Predicted (not measured) hours for this many FLOPs on some GPUs, assuming EFFICIENCY."""
    return {gpu: run_flops / (EFFICIENCY * peak) / 3600 for gpu, peak in PEAKS.items()}


def cost_lines(cost: dict[str, Any]) -> str:
    """The closing lines of a run.

    Args:
        cost: the results of `cost_of_compute` and `Meter.report`, `samples_per_second`, and for a large run without a GPU
            `predicted_gpu_hours` from `predicted`.
    """
    kind = "GPU" if "gpu_hours" in cost else "CPU"
    share = ""
    if "fraction_of_matmul_peak" in cost:
        share = f" ({_percent(cost['fraction_of_matmul_peak'])} of the matmul peak measured in this run)"
    parts = [
        _duration(cost[f"{kind.lower()}_hours"], kind),
        f"{digits(cost['samples_per_second'])} samples/s",
        f"{_with_prefix(cost['tflops'] * 1e12, 'FLOP/s')}{share}",
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
    """Format with this many significant digits, never with an exponent."""
    return f"{Decimal(f'{value:.{count}g}'):f}"


def _percent(share: float) -> str:
    return f"{digits(100 * share, 2)} %"


def _duration(hours: float, kind: str) -> str:
    return f"{digits(hours)} {kind}-hours" if hours >= 0.03 else f"{digits(hours * 3600)} {kind}-seconds"


def _with_prefix(value: float, unit: str) -> str:
    """Format with a prefix from milli to tera, so that the number is between 1 and 1000."""
    power = min(max(math.floor(math.log10(value) / 3), -1), 4) if value else 0
    return f"{digits(value / 1000**power)} {('m', '', 'k', 'M', 'G', 'T')[power + 1]}{unit}"
