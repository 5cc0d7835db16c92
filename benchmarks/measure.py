"""Times of several ways to do one thing: in one process, taking turns, so that a machine's moods hit all of them alike."""

import statistics
import time
from collections.abc import Callable

import torch

CALLS_PER_GRAPH = 10


def timer(function: Callable[[], object], device: str) -> Callable[[], float]:
    """A function that runs `function` and returns seconds; on CUDA by events around the replay of a graph."""
    if device == "cpu":

        def run() -> float:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started

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


def interleaved(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm, forth and back (ABBA); the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in list(arms) if turn % 2 else list(arms)[::-1]:
            measured = arms[name]()
            if turn:
                seconds[name].append(measured)
    return seconds


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(seconds, n=4))
