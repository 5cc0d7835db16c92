"""benchmarks/run_gpu.sh: its parts, their order, what it skips and says; mostly with an interpreter that is pretended."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
BENCHMARKS = {
    "ladder": "ladder",
    "ops": "ops",
    "hours-sd15": "hours -k SD1.5",
    "guidance": "guidance",
    "tandem": "tandem",
    "scaling": "scaling",
    "hours-sdxl": "hours -k SDXL",
    "hours-video": "hours -k CogVideoX",
}
PARTS = ["build", "env", "kernels", "steps", *BENCHMARKS, "kernels-all"]
PARTS.insert(PARTS.index("guidance"), "budget")

PRETENDED = f"""#!/bin/sh
case "$*" in
*sys.executable*) echo "$0" ;;
*is_available*) exit "${{NO_GPU:-0}}" ;;
*json.dumps*) exec {sys.executable} "$@" ;;
*)
    echo "$@" >>"$(dirname "$0")/calls"
    case "$*" in *"${{FAILING:-nothing}}"*) exit 3 ;; *"${{LASTING:-nothing}}"*) exec sleep 60 ;; esac
    ;;
esac
"""


class Runs:
    """Runs of a script with the pretended interpreter."""

    def __init__(self, folder: Path):
        self.python, self.out, self.script = folder / "python", folder / "out", SCRIPT
        self.python.write_text(PRETENDED)
        self.python.chmod(0o755)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        (self.python.parent / "calls").write_text("")
        return call(self.script, *arguments, **({"PYTHON": str(self.python)} | environment))

    def calls(self) -> list[str]:
        return (self.python.parent / "calls").read_text().splitlines()

    def summary(self) -> dict:
        return json.loads((self.out / "summary.json").read_text())

    def outcomes(self) -> dict[str, str]:
        return {row["part"]: row["outcome"] for row in self.summary()["parts"]}


def call(script: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", script, *arguments]
    # pytest-benchmark takes a run within a worker of pytest-xdist for one of its own, and measures nothing there.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environment, timeout=240)


@pytest.fixture
def run(tmp_path):
    return Runs(tmp_path)


def test_every_part_runs_once_and_most_important_first(run):
    done = run(run.out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.sub(r" +\d+ s +", " ", done.stdout).splitlines() == [f"{part} passed" for part in PARTS]
    tests = [f"-m pytest -q --junitxml={run.out}/{part}.xml" for part in ("kernels", "steps", "kernels-all")]
    benchmarks = [
        f"-m pytest -q --benchmark-only benchmarks/bench_{name}.py --results={run.out}/results{selected}"
        for name, space, selection in (bench.partition(" ") for bench in BENCHMARKS.values())
        for selected in [space + selection]
    ]
    benchmarks.insert(3, f"-m benchmarks.budget_run --results={run.out}/results")
    assert run.calls() == [
        "-m pip install --no-build-isolation --no-deps -e .",
        "-m selfnpo.env",
        f"{tests[0]} -m gpu tests/kernels",
        f"{tests[1]} -m gpu tests/gpu",
        *benchmarks,
        f"{tests[2]} tests/kernels",
    ]
    summary = run.summary()
    assert re.fullmatch("[0-9a-f]{40}|unknown", summary["commit"])
    assert (summary["changed_files"] is None) == (summary["commit"] == "unknown")
    assert summary["dry_run"] is False
    assert all(row["commit"] == summary["commit"] and row["seconds"] < 60 for row in summary["parts"])


def test_a_part_that_fails_stops_nothing_and_is_all_that_runs_again(run):
    done = run(run.out, FAILING="bench_ops")
    assert done.returncode == 1
    assert run.outcomes() == dict.fromkeys(PARTS, "passed") | {"ops": "failed"}
    assert f"failed, see {run.out}/ops.log" in done.stdout
    assert len(run.calls()) == len(PARTS)
    done = run(run.out)
    assert done.returncode == 0
    assert len(run.calls()) == 1
    assert "bench_ops" in run.calls()[0]
    assert done.stdout.count("passed before") == len(PARTS) - 1
    assert run.outcomes() == dict.fromkeys(PARTS, "passed")


def test_a_dry_run_does_not_stand_for_a_run(run):
    assert run("--dry-run", run.out, NO_GPU="1").returncode == 0
    assert all("--collect-only" in line for line in run.calls() if "pytest" in line)
    assert not any("pip" in line for line in run.calls())
    assert run.summary()["dry_run"] is True
    assert run("--dry-run", run.out).returncode == 0
    assert run.calls() == []
    assert run(run.out).returncode == 0
    assert len(run.calls()) == len(PARTS)


def test_a_part_that_outlasts_its_time_and_those_for_which_none_is_left(run, tmp_path):
    text = SCRIPT.read_text()
    assert "TOTAL=535" in text
    run.script = tmp_path / "benchmarks" / SCRIPT.name
    run.script.parent.mkdir()
    run.script.write_text(text.replace("TOTAL=535", "TOTAL=2"))
    assert run(run.out, LASTING="selfnpo.env").returncode == 1
    assert run.outcomes() == dict.fromkeys(PARTS, "not started") | {"build": "passed", "env": "timed out"}
    assert len(run.calls()) == 2


def test_a_call_ends_within_nine_minutes():
    text = SCRIPT.read_text()
    limits = dict(re.findall(r"^(?:part|test_part|bench_part) ([\w-]+) (\d+|\"\$TOTAL\")", text, re.MULTILINE))
    assert [*limits] == PARTS
    assert limits.pop("kernels-all") == '"$TOTAL"'
    total = int(re.search(r"TOTAL=(\d+)", text)[1])
    assert total + 5 <= 540  # with the wait after an interrupt
    assert max(map(int, limits.values())) <= total


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--dryrun"], {}, r"the option --dryrun is unknown; expected benchmarks/run_gpu.sh \[--dry-run\] \[OUT\]"),
        (["one", "two"], {}, "two folders are given, one and two; expected one"),
        (["--dry-run"], {"PYTHON": "/no/python"}, "PYTHON is no interpreter; set it to one"),
        ([], {"NO_GPU": "1"}, "torch finds no GPU here; pass --dry-run to prove paths and options alone"),
        (["/dev/null/out"], {}, "OUT is /dev/null/out, which cannot be made; expected a folder"),
    ],
)
def test_mistakes(run, arguments, environment, message):
    done = run(*arguments, **environment)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {message}", done.stderr.splitlines()[-1])
    assert done.stdout == ""
    assert run.calls() == []


@pytest.mark.slow
def test_a_dry_run_proves_paths_and_options(tmp_path):
    done = call(SCRIPT, "--dry-run", tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [(row["part"], row["outcome"]) for row in rows] == [(part, "passed") for part in PARTS]
    for part in {*PARTS[2:]} - {"budget"}:
        log = (tmp_path / f"{part}.log").read_text()
        assert re.search(r"\d+(/\d+)? tests? collected", log), log
    assert call(SCRIPT, "--dry-run", tmp_path, PYTHON=sys.executable).stdout.count("passed before") == len(PARTS)
