"""How reference and student share a step (selfnpo/tandem.py), by batch and resolution, for a LoRA, which has all strategies.

pytest benchmarks/bench_tandem.py --benchmark-only
"""

from functools import partial

import pytest

from benchmarks.measure import steps
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU, sd15, train_step
from selfnpo.feasible import strategies
from selfnpo.meter import matmul_peak

BUDGET = 4  # seconds


@pytest.mark.parametrize("batch_size", [1, 20])
@pytest.mark.parametrize("side", [32, 64] if ON_GPU else [8, 16])
def bench_strategies(benchmark, record, side, batch_size):
    workload = sd15(side).changed(rank=8, train_batch_size=batch_size)
    config = workload.config
    makers = {name: partial(train_step, workload.changed(tandem=name)) for name in reversed(strategies(config, DEVICE))}
    times, step = steps(makers, DEVICE, BUDGET)
    row = {"model": workload.name.split(",")[0], "latents": f"{side}x{side}", "batch": batch_size}
    row |= {f"{name}, ms": times.ms(name) for name in makers}
    row |= {f"{name}, x": times.ratio("sequential", name) for name in makers if name != "sequential"}
    record("tandem", [row | {"noise, %": 100 * times.noise}], {"matmul FLOP/s": matmul_peak(DEVICE, DTYPE)})
    benchmark.pedantic(step, rounds=1)
