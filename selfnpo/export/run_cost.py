"""What a run cost, as metrics.json holds it."""

import json
from typing import Any

import torch

from selfnpo.budget.cost import Flops, cost_of_compute, predicted, step_flops
from selfnpo.device import Meter, device_name, matmul_peak
from selfnpo.files import write_text
from selfnpo.training.state import TrainState


def training_cost(state: TrainState) -> dict[str, Any]:
    samples = state.step * state.config.total_batch_size
    return {
        "steps": state.step,
        "samples": samples,
        "seconds": state.seconds,
        "startup_seconds": state.startup_seconds,
        "samples_per_second": samples / state.seconds,
        "reference_evaluations_per_sample": state.reference_evaluations / samples,
        "strategy": state.strategy,
        "relative_delta": state.relative_delta(),
        "beside_steps_seconds": {**state.beside},
        "device": f"{device_name(state.base.device)}, torch {torch.__version__}",
    }


def beside_steps(state: TrainState) -> str:
    """A line on what held the steps of the run up, in shares of its time."""
    whole = state.seconds + state.startup_seconds + state.beside["pictures"]
    shares = ", ".join(f"{kind} {100 * seconds / whole:.1f} %" for kind, seconds in state.beside.items())
    return f"beside the steps: {shares} of {whole:.0f} s"


def compute_cost(state: TrainState, meter: Meter, flops: Flops) -> dict[str, Any]:
    """What meter and counted FLOPs say of the run so far; the hours hold everything that training took."""
    config, device = state.config, state.base.device
    evaluations = state.reference_evaluations / (state.step * config.total_batch_size)
    per_step = step_flops(config, flops, evaluations)
    found = cost_of_compute(
        device, state.seconds + state.startup_seconds, state.step * per_step, matmul_peak(device, state.base.dtype)
    )
    found |= meter.report() | {"counted_tflop_per_step": per_step / 1e12}
    if device.type != "cuda" and not state.base.source.is_demo:  # on which no GPU would be busy
        found["predicted_gpu_hours"] = predicted(config.max_train_steps * per_step)
    return found


def save_metrics(
    state: TrainState, status: str, compute: dict[str, Any], quality: dict[str, Any] | None = None
) -> dict[str, Any]:
    """metrics.json; without `quality` the samples were not judged. Returns the cost."""
    cost = training_cost(state) | compute
    write_text(
        state.config.output_dir / "metrics.json", json.dumps({"status": status, "cost": cost, "quality": quality}, indent=1)
    )
    return cost
