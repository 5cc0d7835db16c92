"""How the cost of a training step grows: with the batch, the resolution, and with runs side by side.

pytest benchmarks/bench_scaling.py --benchmark-only
"""

import statistics
from functools import partial

import pytest
import torch
from torch import multiprocessing

from benchmarks.measure import WARM_UPS, steps
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU, Workload, sd15, train_step
from selfnpo.meter import matmul_peak, seconds_of

BATCHES = [1, 4, 20, 40]
SIDES = [32, 64, 96] if ON_GPU else [8, 16, 32]
STEPS = 10
BUDGET = 20 if ON_GPU else 4  # seconds


def row(workload: Workload, grows: str, to: int, quartiles: list[float], seconds: float, samples: int) -> dict:
    """`samples` are done in `seconds`."""
    found = {"model": workload.describe(), "grows": grows, "to": to, "step, ms": quartiles}
    return found | {"sample, ms": 1e3 * seconds / samples, "samples, 1/s": samples / seconds}


@pytest.mark.parametrize("grows", ["batch", "resolution"])
def bench_size(benchmark, record, grows):
    sizes = (
        {to: sd15().changed(train_batch_size=to) for to in BATCHES} if grows == "batch" else {to: sd15(to) for to in SIDES}
    )
    times, step = steps({str(to): partial(train_step, each) for to, each in sizes.items()}, DEVICE, BUDGET)
    rows = [
        row(each, grows, to, times.ms(str(to)), times.median(str(to)), each.config.train_batch_size)
        | {"noise, %": 100 * times.noise}
        for to, each in sizes.items()
    ]
    record("scaling", rows, {"matmul FLOP/s": matmul_peak(DEVICE, DTYPE)})
    benchmark.pedantic(step, rounds=1)


def run(rank: int, threads: int, start, seconds) -> None:
    """One of several processes: when all are ready, a few steps."""
    torch.set_num_threads(threads)
    step = train_step(sd15())
    for _ in range(WARM_UPS):
        step()
    start.wait()
    seconds[rank] = [seconds_of(step, DEVICE) for _ in range(STEPS)]


@pytest.mark.parametrize("processes", [1, 2])
def bench_processes(benchmark, record, processes):
    """Runs that know nothing of one another, on one device."""
    threads = max(1, torch.get_num_threads() // processes)
    with multiprocessing.get_context("spawn").Manager() as manager:
        start, seconds = manager.Barrier(processes), manager.dict()
        arguments = threads, start, seconds
        benchmark.pedantic(partial(multiprocessing.spawn, run, arguments, processes), rounds=1)
        found = [each for values in seconds.values() for each in values]
    workload, quartiles = sd15(), statistics.quantiles(found, n=4)
    samples = processes * workload.config.train_batch_size
    milliseconds = [1e3 * each for each in quartiles]
    record("scaling", [row(workload, "processes", processes, milliseconds, quartiles[1], samples)], {})
