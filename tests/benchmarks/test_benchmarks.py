"""What the benchmarks measure: counts, the released loop, the workloads, rows that are kept, one run of each command."""

import json
import os
import runpy
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import budget_run, conftest, results
from benchmarks.released_loop import ReleasedLoop
from benchmarks.step_cost import held_bytes, step_cost
from benchmarks.workloads import cogvideox, data_rollout, evaluations, real, sd15, sdxl
from selfnpo.config import TrainConfig
from selfnpo.models import load_pretrained
from selfnpo.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


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


def bench(*arguments):
    """pytest, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "-q", *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited)


def test_a_benchmark_prints_and_saves_its_table(tmp_path):
    done = bench("benchmarks/bench_ops.py", "-k", "tweedie and 20x4x64x64", "--results", tmp_path)
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
def row(latents):
    return {"model": "m", "latents": latents, "batch": 4, "sequential, ms": [1.0, 2.0, 3.0]}

def bench_one(record):
    record("tandem", [row("1x1")], {"matmul FLOP/s": 1e9})
    raise RuntimeError("a later factor failed")

def bench_two(record):
    record("tandem", [row("2x2")], {"matmul FLOP/s": 1e9})
    raise KeyboardInterrupt
"""


def test_what_was_recorded_is_saved_whatever_comes_after(tmp_path):
    file = tmp_path / "bench_some.py"
    file.write_text(BENCHES)
    options = "-c", ROOT / "pyproject.toml", "-p", "benchmarks.conftest", "-p", "no:cacheprovider"
    done = bench(file, *options, "--results", tmp_path)
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

    def part(steps, seconds=0):
        monkeypatch.setattr(budget_run, "time", SimpleNamespace(monotonic=count().__next__))  # a second a step
        options = budget_run.BudgetRun(compile=False, max_train_steps=steps, max_seconds=seconds, results=tmp_path)
        code = budget_run.main(options)
        (row,) = (row for row in results.rows_before("budget", tmp_path) if row["steps"] == steps)
        return code, row

    code, one = part(10**6, seconds=2)
    assert (code, one["steps, done"], one["parts, run"]) == (budget_run.UNFINISHED, 2, 1)
    (path,) = tmp_path.glob("*/*.json")
    path.rename(path.with_name(f"2020-01-01-{'a' * 7}.json"))  # the next part is of another day, on which it is not first
    row = {"model": "m", "latents": "1x1", "batch": 4, "sequential, ms": [1.0, 2.0, 3.0]}
    results.save({"tandem": results.table("tandem", [row], {})}, tmp_path)
    code, both = part(10**6, seconds=3)
    assert (code, both["steps, done"], both["parts, run"]) == (budget_run.UNFINISHED, 5, 2)
    for name in ("training, s", "start-up, s", "predicted training, s"):
        assert both[name] > one[name]
    assert both["training, s"] + both["start-up, s"] == pytest.approx(3600 * both["run, device-hours"])
    assert both["samples, 1/s"] == pytest.approx(2 * 5 / both["training, s"])
    assert "5 of 1000000 steps are done, in 2 parts" in capsys.readouterr().out
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


@pytest.fixture
def command(monkeypatch):
    """Exit code of python -m MODULE ARGUMENTS."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, module, raising=False)  # of which runpy would warn
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        return ended.value.code

    return run


def test_a_budget_run(command, tmp_path, capsys):
    flags = ("--rollout", "data", "--max_train_steps", 2, "--no_compile", "--results", tmp_path)
    assert command("benchmarks.budget_run", *flags) == 0
    (path,) = tmp_path.glob("*/*.json")
    (row,) = json.loads(path.read_text())["tables"]["budget"]["rows"]
    assert row[:6] == [sd15().describe(), "full", "data", 2, 2, 1]
    assert row[6] > 0
    assert str(path.with_suffix(".md")) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("benchmarks.budget_run", ("--rollout", "fresh"), "fresh"),
        ("benchmarks.budget_run", ("--max_train_steps", 0), "error: max_train_steps is 0; expected a value from 1 to"),
        ("benchmarks.budget_run", ("--max_seconds", -1), "error: max_seconds is -1; expected 0 or more"),
        ("benchmarks.budget_run", ("--results", "/dev/null/no"), "error: --results /dev/null/no cannot be written: Not a"),
        ("benchmarks.compare", ("one.json",), "error: got 1 files; expected two"),
    ],
)
def test_mistakes(command, capsys, module, arguments, message):
    assert command(module, *arguments) == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written_are_said_before_anything_is_measured():
    config = SimpleNamespace(getoption=lambda name: Path("/dev/null/no"))
    with pytest.raises(pytest.UsageError, match="--results /dev/null/no cannot be written: Not a directory"):
        conftest.pytest_configure(config)
