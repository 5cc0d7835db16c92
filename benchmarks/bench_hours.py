"""GPU-hours of the paper's run, of its full simulation and of a pool: predicted for published sizes, measured here.

pytest benchmarks/bench_hours.py --benchmark-only
"""

from functools import cache, partial

import pytest

from benchmarks.measure import against_peak, steps
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU, cogvideox, evaluations, real, sd15, sdxl, train_step
from selfnpo.budget.cost import PEAKS, Flops, count_flops, predicted, step_flops
from selfnpo.device import matmul_peak

A800 = PEAKS["A100"]  # the same chip, except for its links to other GPUs
STEPS = 1000
RANK = 8
WEIGHTS = {"full": {}, f"LoRA of rank {RANK}": {"rank": RANK}}
RUNS = {
    "K = 5": {"rollout": "data", "num_rollout_steps": 5},
    "full simulation": {"rollout": "full"},
    "pool": {"rollout": "pool"},
}
AS_RELEASED = 12  # evaluations of the reference per sample
# From the paper, in hours of A800s (of A100s for full weights of Diffusion-NPO).
PUBLISHED = {
    ("SD1.5", "full", "as released"): 2.0,
    ("SD1.5", "full", "full simulation"): 10.4,
}
OTHERS = [("SD1.5", "full", "Diffusion-NPO", 384.0), ("SD1.5", "LoRA", "Diffusion-NPO", 153.6)]
MEASURED = {"SD1.5": sd15, "SDXL": sdxl, "CogVideoX-2b": cogvideox}
BUDGET = 6 if ON_GPU else 3  # seconds per model and kind of weights


@cache
def published_flops(name: str, **changes: int) -> Flops:
    workload = real(name, **changes)
    return count_flops(workload.config, workload.source)


@pytest.mark.parametrize("name", MEASURED)
def bench_predicted_hours(record, name):
    """From FLOPs counted on the meta device."""
    rows = [
        {"model": model, "weights": weights, "run": run, "published, hours": hours}
        for model, weights, run, hours in OTHERS
        if model == name
    ]
    for weights, changes in WEIGHTS.items():
        workload = real(name, **changes)
        config, flops = workload.config, published_flops(name, **changes)
        counts = {"as released": AS_RELEASED} | {
            run: evaluations(workload.changed(**settings).config) for run, settings in RUNS.items()
        }
        for run, per_sample in counts.items():
            work = step_flops(config, flops, per_sample)
            hours, published = predicted(STEPS * work), PUBLISHED.get((name, weights, run))
            rows.append(
                {
                    "model": workload.describe(),
                    "weights": weights,
                    "run": run,
                    "run, PFLOP": STEPS * work / 1e15,
                    "A800, hours": hours["A100"],
                    "H100, hours": hours["H100"],
                    "published, hours": published,
                    "published, % of A800 peak": 100 * STEPS * work / (3600 * published * A800) if published else None,
                }
            )
    record("hours", rows, {})


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MEASURED)
def bench_steps(record, name, weights):
    """Not compiled: that takes minutes, and the ladder already shows what compiling gains."""
    workload = MEASURED[name]().changed(**WEIGHTS[weights])
    runs = {run: workload.changed(**settings) for run, settings in RUNS.items()}
    peak, flops = matmul_peak(DEVICE, DTYPE), count_flops(workload.config, workload.source)
    makers = {run: partial(train_step, each) for run, each in runs.items()}
    for run, times, note in steps(makers, DEVICE, BUDGET):
        config, seconds = runs[run].config, times.median(run)
        per_sample = evaluations(config)
        work = step_flops(config, flops, per_sample)
        full_size = step_flops(config, published_flops(name, **WEIGHTS[weights]), per_sample)
        row = {
            "model": workload.describe(),
            "weights": weights,
            "run": run + note,
            "step, ms": times.ms(run),
            "samples, 1/s": config.total_batch_size / seconds,
            "run, device-hours": STEPS * seconds / 3600,
            "on an A800, hours": STEPS * full_size / (work / seconds / peak * A800) / 3600,
            "noise, %": 100 * times.noise,
        }
        record("steps", [row | against_peak(work, seconds, peak)], {"matmul FLOP/s": peak})
