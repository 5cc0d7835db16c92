"""How reference and student share a step (selfnpo/training/tandem.py), by batch and resolution, for a LoRA.

pytest benchmarks/bench_tandem.py --benchmark-only
"""

from functools import partial

import pytest

from benchmarks.measure import steps
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU, sd15, train_step
from selfnpo.device import matmul_peak
from selfnpo.training.supported import strategies

BUDGET = 2 if ON_GPU else 4  # seconds


@pytest.mark.parametrize("batch_size", [1, 20])
@pytest.mark.parametrize("side", [32, 64] if ON_GPU else [8, 16])
def bench_strategies(record, side, batch_size):
    workload = sd15(side).changed(rank=8, train_batch_size=batch_size)
    names = strategies(workload.config, DEVICE)
    makers = {name: partial(train_step, workload.changed(tandem=name)) for name in reversed(names)}
    row = {"model": workload.name.split(",")[0], "latents": f"{side}x{side}", "batch": batch_size}
    peak = matmul_peak(DEVICE, DTYPE)
    for name, times, note in steps(makers, DEVICE, BUDGET):
        if note:  # strategies are compared only as captured graphs
            print(f"left out: {name}{note}")
            continue
        row |= {f"{name}, ms": times.ms(name), "noise, %": 100 * times.noise}
        row |= {f"{other}, x": times.ratio("sequential", other) for other in names if other != "sequential"}
        record("tandem", [row], {"matmul FLOP/s": peak})
