"""From a loop that works like the released code to the full stack, one factor at a time.

pytest benchmarks/bench_ladder.py --benchmark-only
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.measure import against_peak, steps, uncaptured
from benchmarks.released_loop import ReleasedLoop
from benchmarks.step_cost import held_bytes, step_cost
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU, Workload, evaluations, sd15
from selfnpo.budget.cost import count_flops, step_flops
from selfnpo.device import matmul_peak
from selfnpo.training.trainer import Trainer

if not ON_GPU:  # on a GPU the setting would miss Inductor's cache
    torch._inductor.config.cpp.enable_kernel_profile = True  # so that compiled loops can be counted
BUDGET = 30 if ON_GPU else 12  # seconds

Loop = ReleasedLoop | Trainer


def factors(workload: Workload) -> dict[str, Callable[[], Loop]]:
    """Loops by name: the factor that each adds to the previous one."""
    plain = {"attention": "sdpa", "capture": "off", "tandem": "sequential"} if ON_GPU else {}

    def released(**taken_away: bool) -> Loop:
        return ReleasedLoop(workload.config, workload.load(), **taken_away)

    def ours(channels_last: bool = False, **changes: object) -> Loop:
        return replace(workload.changed(**(plain | changes)), channels_last=channels_last).trainer()

    found = {
        "released recipe": released,
        "skip zero-weight passes": partial(released, dead_calls=False),
        "no loops or reads on the host": partial(released, dead_calls=False, host_loops=False),
        "clip, AdamW and EMA in one pass": partial(released, dead_calls=False, host_loops=False, one_pass=True),
        "fused ops, skip finished rollouts": partial(ours, rollout="data", loss="huber", loss_weighting="x0"),
        "pool: one evaluation per sample": ours,
    }
    if not ON_GPU:
        return found | {"torch.compile": partial(ours, compile=True)}
    return found | {
        "attention by shape": partial(ours, attention="auto"),
        "channels last": partial(ours, attention="auto", channels_last=True),
        "torch.compile": partial(ours, attention="auto", compile=True),
        "one CUDA graph": partial(ours, attention="auto", compile=True, capture="on"),
        "networks side by side": partial(ours, attention="auto", compile=True, capture="on", tandem="auto"),
    }


def bench_ladder(record):
    workload = sd15()
    peak, flops = matmul_peak(DEVICE, DTYPE), count_flops(workload.config, workload.source)
    before: dict[str, int] = {}

    def make(factor: str, maker: Callable[[], Loop]) -> Callable[[], object]:
        before[factor] = held_bytes()
        return maker().train_step

    def visit(factor: str, step: Callable[[], object]) -> dict[str, Any]:
        cost, loop = step_cost(step, DEVICE), step.__self__
        held = 0 if ON_GPU else held_bytes() - before[factor]  # on a GPU the peak includes it
        return {
            "factor": factor + uncaptured(step),
            "memory, MiB": (held + cost.peak_bytes) / 2**20,
            "launches, per step": cost.launches,
            "host reads, per step": cost.host_reads,
            "evaluations, per sample": loop.evaluations if isinstance(loop, ReleasedLoop) else evaluations(loop.config),
        }

    makers = {factor: partial(make, factor, maker) for factor, maker in factors(workload).items()}
    for factor, times, seen in steps(makers, DEVICE, BUDGET, visit):
        seconds, work = times.median(factor), step_flops(workload.config, flops, seen["evaluations, per sample"])
        row = {
            "model": workload.describe(),
            "step, ms": times.ms(factor),
            "samples, 1/s": workload.config.train_batch_size / seconds,
            "speed, x": times.ratio("released recipe", factor),
            "computed, GFLOP/s": work / seconds / 1e9,
            "noise, %": 100 * times.noise,
        }
        record("ladder", [row | seen | against_peak(work, seconds, peak)], {"matmul FLOP/s": peak})
