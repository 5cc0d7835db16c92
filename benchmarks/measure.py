"""Times of several ways to do one thing: in one process, taking turns, so that a machine's moods hit all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from selfnpo.meter import EFFICIENCY, seconds_of

CALLS_PER_GRAPH = 10
SHORTEST = 2e-3  # seconds; on a CPU shorter calls are timed several at once
WARM_UPS = 8  # steps of a loop on a GPU: compiled, watched, captured
WARM_UPS_CPU = 2
WARM_UP_SECONDS = 15  # after which two will do
ROUNDS = (3, 50)
AGAIN = "again"  # an arm that is the last one of the others once more


@dataclass(frozen=True)
class Times:
    quartiles: dict[str, tuple[float, float, float]]  # seconds by arm
    noise: float  # between the last arm and itself, as a share

    def median(self, arm: str) -> float:
        return self.quartiles[arm][1]

    def ms(self, arm: str) -> list[float] | None:
        """Quartiles in milliseconds; None for an arm that was not there."""
        return [float(f"{1e3 * value:.5g}") for value in self.quartiles[arm]] if arm in self.quartiles else None

    def ratio(self, arm: str, to: str) -> float | None:
        """The time of `arm` as a multiple of that of `to`."""
        return self.median(arm) / self.median(to) if {arm, to} <= self.quartiles.keys() else None


def against_peak(work: float, seconds: float, peak: float) -> dict[str, float]:
    """Columns for a step of `work` FLOPs: its share of the matmul peak measured beside it, and what was predicted."""
    predicted = work / (EFFICIENCY * peak)
    return {
        "of matmul peak, %": 100 * work / seconds / peak,
        "predicted step, ms": 1e3 * predicted,
        "error of that, %": 100 * (predicted / seconds - 1),
    }


def timer(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """A function that runs `function` a few times and returns seconds per call; on CUDA by events around the replay of a
    graph."""
    if device.type == "cpu":
        function()  # compiles it, where it is compiled
        calls = max(1, int(SHORTEST / seconds_of(function, device)))

        def run() -> float:
            started = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - started) / calls

        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            function()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / CALLS_PER_GRAPH

    return replay


def in_turns(arms: dict[str, Callable[[], float]], budget: float) -> Times:
    """Times of `arms`, which are warm and each return their own, forth and back (ABBA), for about `budget` seconds.

    The last arm runs twice in every round, far apart.
    """
    arms = {AGAIN: [*arms.values()][-1]} | arms
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    started, rounds, turn = time.perf_counter(), 1, 0
    while turn < rounds:
        for name in list(arms)[::-1] if turn % 2 else arms:
            seconds[name].append(arms[name]())
        turn += 1
        if turn == 1:
            rounds = _rounds(time.perf_counter() - started, budget)
    return _times(seconds)


def steps(
    makers: dict[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    budget: float,
    visit: Callable[[str, Callable[[], object]], object] = lambda name, step: None,
) -> tuple[Times, Callable[[], object]]:
    """Times of training steps, each made by its maker and then visited once; and the last of them.

    In turns on a CPU; on a GPU, which the activations of few loops fill, one after the other, the last one twice.
    """
    if device.type == "cpu":
        made = {}
        for name, make in makers.items():
            made[name] = _warm(make, WARM_UPS_CPU)
            visit(name, made[name])
        return in_turns({name: partial(seconds_of, step, device) for name, step in made.items()}, budget), made[name]
    seconds: dict[str, list[float]] = {}
    step = None
    for name, make in makers.items():
        del step  # and its memory
        gc.collect()
        torch.cuda.empty_cache()
        step = _warm(make, WARM_UPS)
        visit(name, step)
        for arm in (name, AGAIN) if name == [*makers][-1] else (name,):
            rounds = _rounds(seconds_of(step, device), budget / (len(makers) + 1))
            seconds[arm] = [seconds_of(step, device) for _ in range(rounds)]
    return _times(seconds), step


def _warm(make: Callable[[], Callable[[], object]], times: int) -> Callable[[], object]:
    step, started = make(), time.perf_counter()
    for done in range(times):
        if done < 2 or time.perf_counter() - started < WARM_UP_SECONDS:
            step()
    return step


def _rounds(seconds: float, budget: float) -> int:
    least, most = ROUNDS
    return min(max(int(budget / seconds), least), most)


def _times(seconds: dict[str, list[float]]) -> Times:
    quartiles = {name: tuple(statistics.quantiles(values, n=4)) for name, values in seconds.items()}
    again, last = quartiles.pop(AGAIN)[1], [*quartiles.values()][-1][1]
    return Times(quartiles, abs(again / last - 1))
