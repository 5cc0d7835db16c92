"""What a run cost, as metrics.json holds it."""

import json
from typing import Any

import torch

from selfnpo.budget.cost import FILLS_A_GPU, Flops, cost_of_compute, predicted, step_flops
from selfnpo.device import Meter, device_name, matmul_peak
from selfnpo.files import write_text
from selfnpo.training.state import TrainState

LITTLE = 0.001  # relative_delta below which a run is told that it moved little


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


def strength_note(state: TrainState) -> str:
    """A sentence for a run that hardly moved the weights; empty for others."""
    moved = state.relative_delta()
    if moved >= LITTLE:
        return ""
    return (
        f"note: the weights moved by {100 * moved:.2g} %, which is little: on the demo a negative has 6 % of its effect on "
        "FD at 0.04 % and 80 % at 2.8 %. For a stronger one raise --learning_rate or --max_train_steps; "
        "--max_relative_delta 0.03 ends a run that has moved far enough. Larger models may need less: compare the pictures "
        "first.\n"
    )


def compute_cost(state: TrainState, meter: Meter, flops: Flops) -> dict[str, Any]:
    """What meter and counted FLOPs say of the run so far; the hours hold everything that training took."""
    config, device = state.config, state.base.device
    evaluations = state.reference_evaluations / (state.step * config.total_batch_size)
    per_step = step_flops(config, flops, evaluations)
    # A CPU is shared: what a product reaches at the end says nothing about the minutes before.
    peak = matmul_peak(device, state.base.dtype) if device.type == "cuda" else None
    found = cost_of_compute(device, state.seconds + state.startup_seconds, state.step * per_step, peak)
    found |= meter.report() | {"counted_tflop_per_step": per_step / 1e12}
    if device.type != "cuda" and per_step >= FILLS_A_GPU:
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
