"""How benchmarks measure: in turns, warm, row by row, whatever fails; and what they time can be captured."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_ladder, bench_ops, measure, workloads
from benchmarks.workloads import DoesNotFit, sd15
from pretended_device import pretended_device
from selfnpo.training.capture import Recorder, Replayed, difference

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_arms_take_turns_and_the_last_one_runs_twice():
    calls = []

    def arm(name, seconds):
        def run():
            calls.append(name)
            return next(seconds)

        return run

    times = measure.in_turns({"a": arm("a", iter([2.0] * 50)), "b": arm("b", iter([1.0, 1.1, 1.1, 1.0] * 99))}, 0.0)
    least, _ = measure.ROUNDS
    assert calls[:6] == ["b", "a", "b", "b", "a", "b"]
    assert calls.count("a") == least
    assert calls.count("b") == 2 * least
    assert set(times.quartiles) == {"a", "b"}
    assert times.median("a") == 2.0
    assert times.ratio("a", "b") == pytest.approx(2.0, rel=0.1)
    assert times.noise == pytest.approx(0.1, abs=0.02)
    assert times.ms("a") == [2000.0] * 3
    assert times.ms("c") is times.ratio("c", "a") is None


def test_the_budget_decides_how_many_rounds():
    calls = []
    measure.in_turns({"a": lambda: calls.append(1) or 1e-3}, 1e9)
    assert len(calls) == 2 * measure.ROUNDS[1]


@pytest.fixture
def on_gpu(monkeypatch):
    """What waits for a GPU does not."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def graph(calls: int) -> Replayed:
    """A step that replays its graph after so many calls; None for never."""
    found = Replayed.__new__(Replayed)
    found.step, found.replay, found.left = lambda: None, None, calls
    return found


class Loop:
    """A trainer with `execute` as its step."""

    def __init__(self, execute):
        self.calls, self.step = 0, SimpleNamespace(_execute=execute)

    def train_step(self):
        self.calls += 1
        execute = self.step._execute
        if isinstance(execute, Replayed) and self.calls == execute.left:
            execute.replay = lambda: None


@pytest.mark.parametrize(("execute", "calls"), [(None, 2), (graph(6), 6), (graph(1), 2), (graph(None), 8)])
def test_a_loop_is_warm_when_its_graph_replays_however_long_that_takes(monkeypatch, on_gpu, execute, calls):
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", -1)
    loop = Loop(execute)
    step = measure.warm(loop.train_step, CUDA)
    assert loop.calls == calls
    assert measure.uncaptured(step) == (" (NOT captured)" if calls == 8 else "")
    if calls == 6:
        execute.replay = execute.step  # as where capturing failed
        assert measure.uncaptured(step) == " (NOT captured)"


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_loops_that_fail_or_do_not_fit_stop_no_other(on_gpu, capfd, device):
    alive, events = [], []

    def make(name, error=None):
        if device == CUDA:
            gc.collect()
            assert not [each for each in alive if each()], "the loop before still holds its memory"
        if error:
            raise error
        loop = Loop(None)
        alive.append(weakref.ref(loop))
        events.append(name)
        return loop.train_step

    makers = {
        "first": partial(make, "first"),
        "too large": partial(make, "too large", DoesNotFit("got 1 GiB, needed 2")),
        "broken": partial(make, "broken", torch.OutOfMemoryError("no more")),
        "last": partial(make, "last"),
    }

    def save():
        for name, times, note in measure.steps(makers, device, 0.0):
            events.append(f"{name} is saved")
            assert (note, times.ms(name)[0] >= 0, times.ratio(name, "too large")) == ("", True, None)

    with pytest.raises(RuntimeError, match=r"^broken failed: OutOfMemoryError: no more$"):
        save()
    saved = ["first is saved", "last is saved"]
    assert events == (["first", saved[0], "last", saved[1]] if device == CUDA else ["first", "last", *saved])
    said = capfd.readouterr()
    assert "skipped too large: got 1 GiB, needed 2\n" in said.out
    assert "Traceback" in said.err


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(workloads, "free_memory", lambda device: 1.5 * 98 * 2**20)
    workload = sd15()
    workload.check_fits()
    with pytest.raises(DoesNotFit, match=r", in 2 processes: got 0.1 GiB of free memory, needed 0.2 by the plan$"):
        workload.check_fits(2)
    monkeypatch.setattr(workloads, "free_memory", lambda device: 0)
    with pytest.raises(DoesNotFit):
        workloads.train_step(workload)


def test_the_ladder_saves_every_factor_as_it_ends(monkeypatch, on_gpu):
    workload, rows = sd15(8).changed(train_batch_size=2), []
    monkeypatch.setattr(bench_ladder, "sd15", lambda: workload)
    monkeypatch.setattr(bench_ladder, "steps", lambda makers, _, *rest: measure.steps(makers, CUDA, *rest))
    monkeypatch.setattr(bench_ladder, "BUDGET", 0)
    whole = bench_ladder.factors(workload)
    names = ["released recipe", "skip zero-weight passes", "pool: one evaluation per sample"]
    some = {name: whole[name] for name in names} | {names[1]: lambda: 1 / 0}
    monkeypatch.setattr(bench_ladder, "factors", lambda _: some)
    with pytest.raises(RuntimeError, match=r"^skip zero-weight passes failed: ZeroDivisionError: division by zero$"):
        bench_ladder.bench_ladder(lambda name, new, ceilings: rows.append((name, new, ceilings)))
    assert [(name, row["factor"]) for name, (row,), _ in rows] == [("ladder", names[0]), ("ladder", names[2])]
    first, last = (row for _, (row,), _ in rows)
    assert first["speed, x"] == 1
    assert last["speed, x"] == pytest.approx(first["step, ms"][1] / last["step, ms"][1], rel=1e-3)
    assert rows[0][2] == rows[1][2]  # one ceiling


def test_the_layout_is_a_factor_of_its_own(monkeypatch):
    workload = sd15(8).changed(train_batch_size=1)
    monkeypatch.setattr(bench_ladder, "ON_GPU", True)
    names = [*bench_ladder.factors(workload)]
    assert names[names.index("torch.compile") - 1] == "channels last"
    for loop, expected in ((workload, False), (replace(workload, channels_last=True), True)):
        student = loop.trainer().state.student
        convolutions = [weight for weight in student.trainable.values() if weight.ndim == 4 and weight.shape[-1] == 3]
        assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions} == {expected}


def arms_of(monkeypatch, bench, *arguments):
    found = []
    monkeypatch.setattr(bench_ops, "report", lambda record, op, size, arms, *_: found.append(arms))
    bench(None, *arguments)
    return {name: arm for name, arm in found[0].items() if name != "compile"}


@pytest.mark.parametrize("op", [*bench_ops.OPS, None])
def test_ops_can_be_captured(monkeypatch, op):
    """Nothing is made, read or counted on the host but random numbers, which PyTorch's generator counts for a graph."""
    bench = (bench_ops.bench_op, op) if op else (bench_ops.bench_optimizer,)
    for name, arm in arms_of(monkeypatch, *bench, "20x4x64x64").items():
        arm()
        watched = [Recorder(), Recorder()]
        for recorder in watched:
            with recorder:
                arm()
            recorder.faults = [fault for fault in recorder.faults if "draws random numbers" not in fault]
        assert difference(*watched) == "", (op, name)


def test_torchs_optimizer_can_be_captured(monkeypatch):
    asked = []
    make = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: asked.append(options) or make(*args, **options))
    monkeypatch.setattr(bench_ops, "report", lambda *_: None)
    for device, expected in ((CPU, False), (CUDA, True)):
        monkeypatch.setattr(bench_ops, "DEVICE", device)
        with pretended_device():
            bench_ops.bench_optimizer(None, "20x4x64x64")
        assert asked.pop()["capturable"] == expected
