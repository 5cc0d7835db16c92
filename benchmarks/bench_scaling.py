"""How the cost of a training step grows with the batch, the resolution, and parallel runs.

pytest benchmarks/bench_scaling.py --benchmark-only
"""

import statistics
from functools import partial

import pytest
import torch
from torch import multiprocessing

from benchmarks.measure import release, steps, warm
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU, DoesNotFit, sd15, train_step
from selfnpo.device import matmul_peak, seconds_of

BATCHES = [1, 4, 20, 40]
SIDES = [32, 64, 96] if ON_GPU else [8, 16, 32]
STEPS = 10
BUDGET = 5 if ON_GPU else 4  # seconds


def row(model: str, grows: str, to: int, quartiles: list[float], seconds: float, samples: int) -> dict:
    """A row for `samples` samples that took `seconds` seconds."""
    found = {"model": model, "grows": grows, "to": to, "step, ms": quartiles}
    return found | {"sample, ms": 1e3 * seconds / samples, "samples, 1/s": samples / seconds}


@pytest.mark.parametrize("grows", ["batch", "resolution"])
def bench_size(record, grows):
    sizes = (
        {to: sd15().changed(train_batch_size=to) for to in BATCHES} if grows == "batch" else {to: sd15(to) for to in SIDES}
    )
    peak = matmul_peak(DEVICE, DTYPE)
    for to, times, note in steps({to: partial(train_step, each) for to, each in sizes.items()}, DEVICE, BUDGET):
        model, batch_size = sizes[to].describe() + note, sizes[to].config.train_batch_size
        found = row(model, grows, to, times.ms(to), times.median(to), batch_size) | {"noise, %": 100 * times.noise}
        record("scaling", [found], {"matmul FLOP/s": peak})


def run(rank: int, threads: int, start, seconds) -> None:
    """One of several processes. Once all are ready, it takes a few steps."""
    torch.set_num_threads(threads)
    step = warm(sd15().trainer().train_step, DEVICE)
    start.wait()
    seconds[rank] = [seconds_of(step, DEVICE) for _ in range(STEPS)]


@pytest.mark.parametrize("processes", [1, 2])
def bench_processes(record, processes):
    """Independent runs on one device."""
    workload = sd15()
    release()
    try:
        workload.check_fits(processes)
    except DoesNotFit as error:
        pytest.skip(str(error))
    threads = max(1, torch.get_num_threads() // processes)
    with multiprocessing.get_context("spawn").Manager() as manager:
        start, seconds = manager.Barrier(processes), manager.dict()
        arguments = threads, start, seconds
        multiprocessing.spawn(run, arguments, processes)
        found = [each for values in seconds.values() for each in values]
    quartiles = statistics.quantiles(found, n=4)
    samples = processes * workload.config.train_batch_size
    milliseconds = [1e3 * each for each in quartiles]
    record("scaling", [row(workload.describe(), "processes", processes, milliseconds, quartiles[1], samples)], {})
