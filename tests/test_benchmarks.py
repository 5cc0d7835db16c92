"""What the benchmarks measure and how: taking turns, counting, the released loop, the workloads, one run of each command."""

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_ladder, bench_ops, budget_run, measure, results, workloads
from benchmarks.released_loop import ReleasedLoop
from benchmarks.step_cost import held_bytes, step_cost
from benchmarks.workloads import DoesNotFit, cogvideox, data_rollout, evaluations, real, sd15, sdxl
from pretended_device import pretended_device
from selfnpo.capture import Recorder, Replayed, difference
from selfnpo.config import TrainConfig
from selfnpo.models import load_pretrained
from selfnpo.trainer import Trainer

ROOT = Path(__file__).parents[1]
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
    names = ["released recipe", "no calls without weight", "pool: one evaluation per sample"]
    some = {name: whole[name] for name in names} | {names[1]: lambda: 1 / 0}
    monkeypatch.setattr(bench_ladder, "factors", lambda _: some)
    with pytest.raises(RuntimeError, match=r"^no calls without weight failed: ZeroDivisionError: division by zero$"):
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
    assert names[names.index("compiled") - 1] == "channels last"
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


def test_what_a_step_costs():
    x = torch.ones(1000, 1000)

    def step():
        y = x + 1  # 4 MB
        z = (y.view(10, -1).T * 2).contiguous()  # 4 MB, and a copy of 4 MB while both live
        return z.sum().item(), y.tolist()[0][0]

    cost = step_cost(step, CPU)
    assert cost.launches == 4  # add, mul, copy, sum
    assert cost.host_reads == 2
    assert cost.peak_bytes == pytest.approx(12e6, rel=0.01)


def test_held_bytes():
    before = held_bytes()
    kept = torch.zeros(1 << 20)
    views = kept[:10], kept.view(2, -1)
    assert held_bytes() - before == kept.nbytes
    del kept, views
    assert held_bytes() == before


@pytest.fixture(scope="module")
def small():
    return sd15(8).changed(train_batch_size=2)


def trained(small, **taken_away):
    """Weights after two steps from equal random numbers, calls of the reference per step, host reads."""
    loop = ReleasedLoop(small.config, small.load(), **taken_away)
    calls = []
    loop.reference.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    loop.train_step()
    loop.train_step()
    weights = torch.cat([weight.detach().flatten() for weight in loop.model.parameters()])
    average = torch.cat([weight.detach().flatten() for weight in loop.reference.parameters()])
    return weights, average, len(calls) / 2, step_cost(loop.train_step, CPU).host_reads, loop.evaluations


def test_the_released_loop_computes_the_same_without_its_waste(small):
    weights, average, calls, reads, counted = trained(small)
    assert calls == counted == 12
    assert 25 <= reads <= 40  # "about 32 host synchronisations a step"
    base = torch.cat([weight.flatten() for weight in small.load().denoiser.parameters()])
    assert (weights != base).any()
    for taken_away, expected in (
        ({"dead_calls": False}, (6, reads)),
        ({"dead_calls": False, "host_loops": False}, (6, 0)),
    ):
        again, again_average, *found = trained(small, **taken_away)
        assert torch.equal(again, weights)
        assert torch.equal(again_average, average)
        assert (found[0], found[1]) == expected
        assert found[0] == found[2]


def test_the_one_pass_optimizer_is_the_released_ones(small):
    config = small.changed(learning_rate=1e-6, adam_weight_decay=1e-3)  # as the loop's own AdamW
    weights, average, *_ = trained(config, dead_calls=False, host_loops=False)
    again, again_average, *_ = trained(config, dead_calls=False, host_loops=False, one_pass=True)
    torch.testing.assert_close(again, weights, rtol=0, atol=1e-9 + 2e-7 * weights.abs().max().item())
    torch.testing.assert_close(again_average, average, rtol=0, atol=1e-9 + 2e-7 * average.abs().max().item())


def test_evaluations_per_sample():
    base = load_pretrained()
    for rollout in ("pool", "full", "fresh", "data"):
        config = TrainConfig(rollout=rollout, train_batch_size=200, pool_size=1)
        trainer = Trainer(config, base, rollout=data_rollout(config, base) if rollout == "data" else None)
        trainer.train_step()
        expected = evaluations(config)
        assert trainer.step.evaluations / 200 == pytest.approx(expected, rel=0 if rollout in ("pool", "full") else 0.15)
    assert evaluations(TrainConfig(rollout="data")) == 5.4


@pytest.mark.parametrize("make", [sd15, sdxl, cogvideox])
def test_stand_ins_are_named_so_and_train(make):
    workload = make()
    assert workload.name.startswith("stand-in for ")
    assert sum(weight.numel() for weight in workload.source.empty_denoiser().parameters()) < 2e6
    loss, norm = workload.changed(train_batch_size=1, rank=4, rollout="data").trainer().train_step()
    assert torch.isfinite(loss)
    assert norm > 0


@pytest.mark.parametrize(("name", "parameters"), [("SD1.5", 859_520_964), ("SDXL", 2_567_463_684)])
def test_predictions_are_for_published_sizes(name, parameters):
    workload = real(name)
    assert sum(weight.numel() for weight in workload.source.empty_denoiser().parameters()) == parameters
    assert "stand-in" not in workload.describe()


def call(*command, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=inherited | environment,
        timeout=240,
    )  # fmt: skip


def test_a_benchmark_prints_and_saves_its_table(tmp_path):
    selected = "tweedie and 20x4x64x64"
    done = call("pytest", "benchmarks/bench_ops.py", "-k", selected, "--benchmark-only", "-q", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/*.json")
    table = json.loads(path.read_text())["tables"]["ops"]
    (row,) = table["rows"]
    assert row[:2] == ["tweedie", "20x4x64x64"]
    low, middle, high = row[2]
    assert 0 < low <= middle <= high
    assert len(table["ceilings"]["copy B/s"]) == 1
    assert f"results: {path}" in done.stdout
    assert "| tweedie | 20x4x64x64 | " in done.stdout
    assert "**Measured** on " in done.stdout
    assert {each.suffix for each in path.parent.iterdir()} == {".json", ".md", ".png"}


BENCHES = """
import os, signal, time
from benchmarks import results

def row(latents):
    return {"model": "m", "latents": latents, "batch": 4, "sequential, ms": [1.0, 2.0, 3.0]}

def bench_one(record):
    record("tandem", [row("1x1")], {"matmul FLOP/s": 1e9})
    raise RuntimeError("a later factor failed")

def bench_two(record):
    record("tandem", [row("2x2")], {"matmul FLOP/s": 1e9})
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
"""


def test_what_was_recorded_is_saved_whatever_comes_after(tmp_path):
    file = tmp_path / "bench_some.py"
    file.write_text(BENCHES)
    options = "-c", ROOT / "pyproject.toml", "-p", "benchmarks.conftest", "-p", "no:cacheprovider", "--benchmark-only"
    done = call("pytest", file, *options, "--results", tmp_path)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/*.json")
    table = json.loads(path.read_text())["tables"]["tandem"]
    assert [row[1] for row in table["rows"]] == ["1x1", "2x2"]
    assert table["ceilings"] == {"matmul FLOP/s": [1e9]}
    assert path.with_suffix(".md").exists()
    assert "| m | 2x2 | 4 | 2 |" in done.stdout


def test_a_run_in_parts_adds_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget_run, "sd15", lambda: sd15(8).changed(train_batch_size=2))
    monkeypatch.setenv("SELFNPO_COMMIT", "a" * 40)

    def part(steps, seconds=0, **energy):
        options = budget_run.BudgetRun(compile=False, max_train_steps=steps, max_seconds=seconds, results=tmp_path)
        code = budget_run.main(options)
        (row,) = (row for row in results.rows_before("budget", tmp_path) if row["steps"] == steps)
        return code, row

    code, one = part(10**6, seconds=2)
    assert (code, one["parts, run"]) == (budget_run.UNFINISHED, 1)
    assert 0 < one["steps, done"] < 10**5
    (path,) = tmp_path.glob("*/*.json")
    path.rename(path.with_name(f"2020-01-01-{'a' * 7}.json"))  # the next part is of another day, on which it is not first
    row = {"model": "m", "latents": "1x1", "batch": 4, "sequential, ms": [1.0, 2.0, 3.0]}
    results.save({"tandem": results.table("tandem", [row], {})}, tmp_path)
    code, both = part(10**6, seconds=2)
    assert (code, both["parts, run"]) == (budget_run.UNFINISHED, 2)
    for name in ("steps, done", "training, s", "start-up, s", "predicted training, s"):
        assert both[name] > one[name]
    assert both["training, s"] + both["start-up, s"] == pytest.approx(3600 * both["run, device-hours"])
    assert both["samples, 1/s"] == pytest.approx(2 * both["steps, done"] / both["training, s"])
    assert f"{both['steps, done']} of 1000000 steps are done, in 2 parts" in capsys.readouterr().out
    code, done = part(3)  # another run
    assert (code, done["steps, done"], done["parts, run"]) == (0, 3, 1)
    code, again = part(3)  # which is whole, so this one is new
    assert (code, again["steps, done"], again["parts, run"]) == (0, 3, 1)
    assert len(results.rows_before("budget", tmp_path)) == 2


def test_an_energy_that_one_part_does_not_know():
    part = dict.fromkeys(budget_run.ADDED, 2.0)
    assert budget_run.whole(part, part, 20)["energy, Wh"] == 4
    assert budget_run.whole(part | {"energy, Wh": None}, part, 20)["energy, Wh"] is None


def test_the_commit_of_a_copy_without_git(monkeypatch):
    monkeypatch.setenv("SELFNPO_COMMIT", "a" * 40 + "-changed")
    about = results.environment()
    assert (about["commit"], bool(about["changed files"])) == ("a" * 40, True)
    monkeypatch.setenv("SELFNPO_COMMIT", "a" * 40)
    assert results.environment()["changed files"] == []


def test_the_commit_is_the_one_that_a_process_began_with(tmp_path, monkeypatch):
    monkeypatch.delenv("SELFNPO_COMMIT", raising=False)
    results.check_folder(tmp_path)
    before = results.environment()
    monkeypatch.setattr(results, "git", lambda *_: "f" * 40)
    assert results.environment() == before


def test_a_budget_run(tmp_path):
    done = call("benchmarks.budget_run", "--rollout", "data", "--max_train_steps", 2, "--no_compile", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/*.json")
    (row,) = json.loads(path.read_text())["tables"]["budget"]["rows"]
    assert row[:6] == [sd15().describe(), "full", "data", 2, 2, 1]
    assert row[6] > 0
    assert str(path.with_suffix(".md")) in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("benchmarks.budget_run", "--rollout", "fresh"), "fresh"),
        (("benchmarks.budget_run", "--max_train_steps", 0), "error: max_train_steps is 0; expected a value from 1 to"),
        (("benchmarks.budget_run", "--max_seconds", -1), "error: max_seconds is -1; expected 0 or more"),
        (("benchmarks.budget_run", "--results", "/dev/null/no"), "error: --results /dev/null/no cannot be written: Not a"),
        (("benchmarks.compare", "one.json"), "error: got 1 files; expected two"),
        (("pytest", "benchmarks", "--results", "/dev/null/no"), "ERROR: --results /dev/null/no cannot be written: Not a"),
    ],
)
def test_mistakes(command, message):
    done = call(*command)
    assert done.returncode == (4 if command[0] == "pytest" else 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
