"""From a loop that does what the released code does to the full stack, one factor at a time.

pytest benchmarks/bench_ladder.py --benchmark-only
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import against_peak, steps
from benchmarks.released_loop import ReleasedLoop
from benchmarks.step_cost import StepCost, held_bytes, step_cost
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU, Workload, evaluations, sd15
from selfnpo.meter import count_flops, matmul_peak, step_flops
from selfnpo.trainer import Trainer

torch._inductor.config.cpp.enable_kernel_profile = True  # so that compiled loops can be counted
BUDGET = 120 if ON_GPU else 12  # seconds

Loop = ReleasedLoop | Trainer


def factors(workload: Workload) -> dict[str, Callable[[], Loop]]:
    """Loops by the factor that each adds to the one before."""
    plain = {"attention": "sdpa", "capture": "off", "tandem": "sequential"} if ON_GPU else {}

    def released(**taken_away: bool) -> Loop:
        return ReleasedLoop(workload.config, workload.load(), **taken_away)

    def ours(**changes: object) -> Loop:
        return workload.changed(**(plain | changes)).trainer()

    found = {
        "released recipe": released,
        "no calls without weight": partial(released, dead_calls=False),
        "no loops and reads on the host": partial(released, dead_calls=False, host_loops=False),
        "clip, AdamW, average in one pass": partial(released, dead_calls=False, host_loops=False, one_pass=True),
        "fused ops, nothing finished evaluated": partial(ours, rollout="data", loss="huber", loss_weighting="x0"),
        "pool: one evaluation per sample": ours,
    }
    if not ON_GPU:
        return found | {"compiled": partial(ours, compile=True)}
    return found | {
        "attention by shape": partial(ours, attention="auto"),
        "compiled": partial(ours, attention="auto", compile=True),
        "one CUDA graph": partial(ours, attention="auto", compile=True, capture="on"),
        "networks side by side": partial(ours, attention="auto", compile=True, capture="on", tandem="auto"),
    }


def bench_ladder(benchmark, record):
    workload = sd15()
    before, held = {}, {}
    costs: dict[str, StepCost] = {}
    evaluated: dict[str, float] = {}

    def make(factor: str, maker: Callable[[], Loop]) -> Callable[[], object]:
        before[factor] = held_bytes()
        return maker().train_step

    def visit(factor: str, step: Callable[[], object]) -> None:
        costs[factor], loop = step_cost(step, DEVICE), step.__self__
        held[factor] = 0 if ON_GPU else held_bytes() - before[factor]  # there the peak has it
        evaluated[factor] = loop.evaluations if isinstance(loop, ReleasedLoop) else evaluations(loop.config)

    makers = {factor: partial(make, factor, maker) for factor, maker in factors(workload).items()}
    times, step = steps(makers, DEVICE, BUDGET, visit)
    peak, flops = matmul_peak(DEVICE, DTYPE), count_flops(workload.config, workload.source)
    batch, rows = workload.config.train_batch_size, []
    for factor, cost in costs.items():
        seconds, work = times.median(factor), step_flops(workload.config, flops, evaluated[factor])
        rows.append(
            {
                "model": workload.describe(),
                "factor": factor,
                "step, ms": times.ms(factor),
                "samples, 1/s": batch / seconds,
                "speed, x": times.ratio("released recipe", factor),
                "computed, GFLOP/s": work / seconds / 1e9,
                "memory, MiB": (held[factor] + cost.peak_bytes) / 2**20,
                "launches, per step": cost.launches,
                "host reads, per step": cost.host_reads,
                "evaluations, per sample": evaluated[factor],
                "noise, %": 100 * times.noise,
            }
            | against_peak(work, seconds, peak)
        )
    record("ladder", rows, {"matmul FLOP/s": peak})
    benchmark.pedantic(step, rounds=1)
