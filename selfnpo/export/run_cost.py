"""The cost of a run, as recorded in metrics.json."""

import json
from typing import Any

import torch

from selfnpo.budget.cost import FILLS_A_GPU, Flops, cost_of_compute, predicted, step_flops
from selfnpo.device import Meter, device_name, matmul_peak
from selfnpo.files import write_text
from selfnpo.training.state import TrainState

# Below this relative_delta, the user is told that the weights moved little. The densities in the note are from the demo on
# two CPU cores: `train --max_train_steps 20` (400, 2000), then `evaluate --negative ... --num_samples 1000 --seeds 1 2`.
LITTLE = 0.001


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
    """One line on the time that a run spent outside its steps, in percent."""
    whole = state.seconds + state.startup_seconds + state.beside["pictures"]
    shares = ", ".join(f"{kind} {100 * seconds / whole:.1f} %" for kind, seconds in state.beside.items())
    return f"time outside the steps: {shares} of {whole:.0f} s"


def strength_note(state: TrainState) -> str:
    """A note for a run that hardly moved the weights; empty otherwise."""
    moved = state.relative_delta()
    if moved >= LITTLE:
        return ""
    return (
        f"note: the weights moved by only {100 * moved:.2g} %. On the demo, guided at 3, a negative gains 0.03 in density "
        "over plain guidance after moving by 0.04 %, 0.42 after 2 %, and 0.73 after 4.6 %. For a stronger negative, raise "
        "--learning_rate or --max_train_steps; --max_relative_delta 0.03 stops training once the weights have moved by 3 %. "
        "Larger models may need less, so compare the pictures first.\n"
    )


def compute_cost(state: TrainState, meter: Meter, flops: Flops) -> dict[str, Any]:
    """Speed and cost so far, from the meter and counted FLOPs. The hours include the start-up."""
    config, device = state.config, state.base.device
    evaluations = state.reference_evaluations / (state.step * config.total_batch_size)
    per_step = step_flops(config, flops, evaluations)
    # A CPU is shared, so its peak at the end says nothing about the time before.
    peak = matmul_peak(device, state.base.dtype) if device.type == "cuda" else None
    found = cost_of_compute(device, state.seconds + state.startup_seconds, state.step * per_step, peak)
    found |= meter.report() | {"counted_tflop_per_step": per_step / 1e12}
    if device.type != "cuda" and per_step >= FILLS_A_GPU:
        found["predicted_gpu_hours"] = predicted(config.max_train_steps * per_step)
    return found


def save_metrics(
    state: TrainState, status: str, compute: dict[str, Any], quality: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write metrics.json and return the cost. Without `quality`, the samples were not judged."""
    cost = training_cost(state) | compute
    write_text(
        state.config.output_dir / "metrics.json", json.dumps({"status": status, "cost": cost, "quality": quality}, indent=1)
    )
    return cost
