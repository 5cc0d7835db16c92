"""Times several ways to do one thing. They take turns in one process, so that a slow machine affects all of them alike."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.workloads import DoesNotFit
from selfnpo.budget.cost import EFFICIENCY
from selfnpo.device import seconds_of
from selfnpo.errors import first_line
from selfnpo.training.capture import Replayed

CALLS_PER_GRAPH = 10
SHORTEST = 2e-3  # seconds; on a CPU shorter calls are timed in groups
WARM_UPS = {"cuda": 8, "cpu": 2}  # steps; on a GPU the sixth one captures the graph, after steps that are watched
WARM_UP_SECONDS = 5  # after the first step, which compiles; enough for loops that are not captured
ROUNDS = (3, 50)
AGAIN = "again"  # an extra arm that repeats the last one

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    quartiles: dict[str, tuple[float, float, float]]  # seconds by arm
    noise: float  # relative difference between an arm and its repetition

    def median(self, arm: str) -> float:
        return self.quartiles[arm][1]

    def ms(self, arm: str) -> list[float] | None:
        """Quartiles in milliseconds, or None for an arm that was not measured."""
        return [float(f"{1e3 * value:.5g}") for value in self.quartiles[arm]] if arm in self.quartiles else None

    def ratio(self, arm: str, to: str) -> float | None:
        """The time of `arm` as a multiple of the time of `to`."""
        return self.median(arm) / self.median(to) if {arm, to} <= self.quartiles.keys() else None


def against_peak(work: float, seconds: float, peak: float) -> dict[str, float]:
    """Columns for a step of `work` FLOPs: its share of the matmul peak measured in the same run, and the prediction."""
    predicted = work / (EFFICIENCY * peak)
    return {
        "of matmul peak, %": 100 * work / seconds / peak,
        "predicted step, ms": 1e3 * predicted,
        "error of that, %": 100 * (predicted / seconds - 1),
    }


class Failures:
    """Collects failures of single measurements while the others continue."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    @contextmanager
    def caught(self, name: str) -> Iterator[None]:
        try:
            yield
        except DoesNotFit as error:
            print(f"skipped {name}: {error}", flush=True)
        except Exception as error:
            traceback.print_exc()
            self.reasons.append(f"{name} failed: {type(error).__name__}: {first_line(error)}")
            print(self.reasons[-1], flush=True)

    def finish(self) -> None:
        """Call this after everything that could be measured is recorded.

        Raises:
            RuntimeError: something failed.
        """
        if self.reasons:
            raise RuntimeError("; ".join(self.reasons))


def timers(arms: dict[str, Step], device: torch.device, failures: Failures) -> dict[str, Callable[[], float]]:
    """A timer (see `timer`) for every arm that can run."""
    found = {}
    for name, function in arms.items():
        with failures.caught(name):
            found[name] = timer(function, device)
    return found


def timer(function: Step, device: torch.device) -> Callable[[], float]:
    """A function that runs `function` a few times and returns seconds per call. On CUDA it times the replay of a graph
    with events."""
    if device.type == "cpu":
        function()  # compiles it, if it is to be compiled
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
        for _ in range(3):  # compiles, loads, and creates optimizer state, none of which a graph can do
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
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
    """Times `arms` for about `budget` seconds in turns, forth and back (ABBA). Arms are warm and return their own seconds.

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
    quartiles = {name: _quartiles(values) for name, values in seconds.items()}
    again, last = quartiles.pop(AGAIN)[1], [*quartiles.values()][-1][1]
    return Times(quartiles, abs(again / last - 1))


def uncaptured(step: Step) -> str:
    """A note for the name of a warm loop that should replay a graph but does not; else empty."""
    execute = _execute(step)
    return "" if not isinstance(execute, Replayed) or execute.replay not in (None, execute.step) else " (NOT captured)"


def steps(
    makers: dict[str, Callable[[], Step]],
    device: torch.device,
    budget: float,
    visit: Callable[[str, Step], Any] = lambda name, step: uncaptured(step),
) -> Iterator[tuple[str, Times, Any]]:
    """Times training steps. Each is made by its maker, warmed up and visited. Yields name, times, what the visit returned.

    On a CPU the steps take turns. On a GPU the activations of a few loops would fill the memory, so they run one after the
    other. Each is yielded when it is done, with the times of those before it; its noise compares its odd and even rounds.

    Raises:
        RuntimeError: at the end, if some steps could not be measured.
    """
    failures = Failures()
    if device.type == "cpu":
        arms, seen = {}, {}
        for name, make in makers.items():
            with failures.caught(name):
                step = warm(make(), device)
                seen[name] = visit(name, step)
                arms[name] = partial(seconds_of, step, device)
        times = in_turns(arms, budget) if arms else None
        yield from ((name, times, seen[name]) for name in arms)
    else:
        quartiles: dict[str, tuple[float, float, float]] = {}
        for name, make in makers.items():
            release()
            with failures.caught(name):
                seconds, found = _alone(name, make, device, budget / len(makers), visit)
                quartiles[name] = _quartiles(seconds)
                odd, even = (statistics.median(seconds[start::2]) for start in (0, 1))
                yield name, Times(dict(quartiles), abs(odd / even - 1)), found
    failures.finish()


def release() -> None:
    """Give back the memory of deleted loops to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def _alone(
    name: str, make: Callable[[], Step], device: torch.device, budget: float, visit: Callable[[str, Step], Any]
) -> tuple[list[float], Any]:
    step = warm(make(), device)
    found = visit(name, step)
    rounds = _rounds(seconds_of(step, device), budget)
    return [seconds_of(step, device) for _ in range(rounds)], found


def warm(step: Step, device: torch.device) -> Step:
    """Call `step` until it is compiled and captured, however long that takes. Returns `step`."""
    step()
    started = time.perf_counter()
    for done in range(1, WARM_UPS[device.type]):
        is_waited_for = getattr(_execute(step), "replay", step) is None
        if done < 2 or is_waited_for or time.perf_counter() - started < WARM_UP_SECONDS:
            seconds_of(step, device)
    return step


def _execute(step: Step) -> Any:
    """What a trainer's step calls: a `Replayed` if it is to be captured."""
    return getattr(getattr(getattr(step, "__self__", None), "step", None), "_execute", None)


def _rounds(seconds: float, budget: float) -> int:
    least, most = ROUNDS
    return min(max(int(budget / seconds), least), most)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4))
