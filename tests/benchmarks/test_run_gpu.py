"""benchmarks/run_gpu.sh: its parts, their order, what it skips and says, with an interpreter that is pretended; and that
pytest and the budget run take the words that it gives them."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.budget_run import BudgetRun
from selfnpo.cli import parse

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
TOTAL = int(re.search(r"TOTAL=(\d+)", SCRIPT.read_text())[1])
COMMIT = "a" * 40
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
PARTS = ["build", "env", "tests", "warm", *BENCHMARKS, "kernels-all"]
PARTS.insert(PARTS.index("hours-sd15"), "budget")

PRETENDED = """#!/bin/sh
case "$*" in
*sys.executable*) echo "$0" ;;
*is_available*) exit "${NO_GPU:-0}" ;;
*)
    echo "$@" >>"$(dirname "$0")/calls"
    case "$*" in *"${FAILING:-nothing}"*) seq 100; exit "${CODE:-3}" ;; *"${LASTING:-nothing}"*) exec sleep 60 ;; esac
    ;;
esac
"""


class Runs:
    """Runs of a script with the pretended interpreter."""

    def __init__(self, folder: Path):
        self.python, self.out, self.work, self.script = folder / "python", folder / "out", folder / "work", SCRIPT
        self.python.write_text(PRETENDED)
        self.python.chmod(0o755)

    def __call__(self, *arguments: str | Path, **environment: str | Path) -> subprocess.CompletedProcess:
        # As in the background of a shell.
        ignored = self.start(*arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), **environment)
        said = ignored.communicate(timeout=60)
        return subprocess.CompletedProcess(ignored.args, ignored.returncode, *said)

    def start(self, *arguments: str | Path, preexec_fn=None, **environment: str | Path) -> subprocess.Popen:
        (self.python.parent / "calls").write_text("")
        set_here = {"PYTHON": self.python, "WORK": self.work, "SELFNPO_COMMIT": COMMIT} | environment
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        command, words = ["bash", self.script, *arguments], {name: str(value) for name, value in set_here.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=inherited | words, preexec_fn=preexec_fn, **pipes)

    def every_call(self) -> list[str]:
        return (self.python.parent / "calls").read_text().splitlines()

    def calls(self) -> list[str]:
        """But for the one that is made while others are."""
        return [line for line in self.every_call() if f"{self.work}/warm" not in line]

    def summary(self) -> dict:
        return json.loads((self.out / "summary.json").read_text())

    def outcomes(self) -> dict[str, str]:
        return {row["part"]: row["outcome"] for row in self.summary()["parts"]}


def names(archive: Path) -> set[str]:
    with tarfile.open(archive) as opened:
        return set(opened.getnames())


@pytest.fixture
def run(tmp_path):
    return Runs(tmp_path)


def lines(done: subprocess.CompletedProcess) -> list[str]:
    return re.sub(r" +\d+ s +", " ", done.stdout).splitlines()


def test_every_part_runs_once_and_most_important_first(run):
    done = run(run.out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(done) == [*(f"{part} passed" for part in PARTS), f"results: {run.out}/gpu.tgz"]
    tests = [f"-m pytest -q -n 8 --junitxml={run.work}/{part}.xml" for part in ("tests", "kernels-all")]
    benchmarks = [
        f"-m pytest -q -s -rs --benchmark-only benchmarks/bench_{name}.py --results={run.work}/results{space + selection}"
        for name, space, selection in (bench.partition(" ") for bench in BENCHMARKS.values())
    ]
    calls = run.calls()
    budget = calls.pop(5)
    seconds = re.fullmatch(rf"-m benchmarks.budget_run --max_seconds=(\d+) --results={run.work}/results", budget)[1]
    assert 400 < int(seconds) < TOTAL - 80  # time for the last checkpoint, and to report
    assert calls == [
        "-m pip install --no-build-isolation --no-deps -e .",
        "-m selfnpo.env",
        f"{tests[0]} -m gpu tests/kernels tests/gpu",
        *benchmarks,
        f"{tests[1]} tests/kernels",
    ]
    summary = run.summary()
    assert (summary["commit"], summary["dry_run"]) == (COMMIT, False)
    assert all(row["commit"] == COMMIT and row["seconds"] < 60 for row in summary["parts"])
    assert sorted(each.name for each in run.out.iterdir()) == ["gpu.tgz", "summary.json"]
    assert {f"work/{part}.log" for part in PARTS} <= names(run.out / "gpu.tgz")


def test_a_part_that_fails_says_why_stops_nothing_and_is_all_that_runs_again(run):
    done = run(run.out, FAILING="bench_ops")
    assert done.returncode == 1
    assert run.outcomes() == dict.fromkeys(PARTS, "passed") | {"ops": "failed"}
    said = lines(done)
    start = said.index("ops failed")
    assert said[start + 1 : start + 16] == [f"    {number}" for number in range(86, 101)]
    assert said[start + 16] == "budget passed"
    done = run(run.out)
    assert done.returncode == 0
    assert len(run.calls()) == 1
    assert "bench_ops" in run.calls()[0]
    assert done.stdout.count("passed before") == len(PARTS) - 2  # nothing is warmed up where no test runs
    assert run.outcomes() == dict.fromkeys((part for part in PARTS if part != "warm"), "passed")


def test_a_whole_run_goes_on_in_the_next_call(run):
    assert run(run.out, FAILING="max_seconds", CODE="75").returncode == 1
    assert run.outcomes() == dict.fromkeys(PARTS, "passed") | {"budget": "unfinished"}
    assert run(run.out).returncode == 0
    assert ["budget_run" in line for line in run.calls()] == [True]


def test_what_passed_stands_for_one_commit(run):
    run(run.out)
    assert run(run.out, SELFNPO_COMMIT="b" * 40).returncode == 0
    assert len(run.calls()) == len(PARTS) - 1
    assert run.summary()["commit"] == "b" * 40


def test_a_new_machine_goes_on_from_the_archive(run, tmp_path):
    run(run.out, FAILING="bench_ops")
    archive = (run.out / "gpu.tgz").rename(tmp_path / "earlier.tgz")
    assert {f"work/{part}.done" for part in ("build", "env", "ops")}.isdisjoint(names(archive))
    run.work = tmp_path / "another"
    assert run(run.out, EARLIER=archive).returncode == 0
    assert [line.split()[-1] for line in run.calls()[:2]] == [".", "selfnpo.env"]
    assert ["bench_ops" in line for line in run.calls()[2:]] == [True]


def test_parts_that_are_asked_for(run):
    assert run(run.out, "budget", "ops").returncode == 0
    assert [*run.outcomes()] == ["build", "ops", "budget"]


def test_wheels_are_installed_for_the_script_alone(run, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    assert run(run.out, WHEELS=wheels).stderr == f"error: WHEELS is {wheels}, which has no wheels\n"
    (wheels / "one.whl").touch()
    assert run(run.out, "env", WHEELS=wheels).returncode == 0
    install, *_ = run.calls()
    assert install.startswith("-m pip install --no-index --no-deps ")
    assert install.endswith(f" --target {run.work}/site {wheels}/one.whl")


def test_a_dry_run_does_not_stand_for_a_run(run):
    assert run("--dry-run", run.out, NO_GPU="1").returncode == 0
    assert not any("pip" in line for line in run.calls())
    assert run.summary()["dry_run"] is True
    assert run("--dry-run", run.out).returncode == 0
    assert run.calls() == []
    assert run(run.out).returncode == 0
    assert len(run.calls()) == len(PARTS) - 1


def test_a_part_that_outlasts_its_time_and_those_for_which_none_is_left(run, tmp_path):
    run.script = tmp_path / "benchmarks" / SCRIPT.name
    run.script.parent.mkdir()
    run.script.write_text(re.sub(r"TOTAL=\d+", "TOTAL=20", re.sub(r"^env .*", "env 10 1", SCRIPT.read_text(), flags=re.M)))
    assert run(run.out, LASTING="selfnpo.env").returncode == 1
    assert next(row["seconds"] for row in run.summary()["parts"] if row["part"] == "env") < 9  # an interrupt was enough
    begun = {"build": "passed", "env": "timed out", "warm": "passed"}
    # Of the others, those begin of whose time half is left.
    assert run.outcomes() == dict.fromkeys(PARTS, "not started") | begun | {"guidance": "passed"}


def test_an_interrupt_ends_the_part_that_runs_and_keeps_what_is_known(run):
    running = run.start(run.out, LASTING="selfnpo.env")
    while not any("selfnpo.env" in line for line in run.every_call()):
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)  # the part would last a minute
    assert running.returncode == 130
    assert said.splitlines()[-1] == f"interrupted; what is known so far: {run.out}/gpu.tgz"
    assert run.outcomes() == {"build": "passed"}
    assert "work/env.log" in names(run.out / "gpu.tgz")


@pytest.mark.parametrize("name", ["link", "site", "warm"])
def test_a_working_folder_of_any_name_is_archived(run, tmp_path, name):
    run.work = tmp_path / name
    if name == "link":
        (tmp_path / "disk").mkdir()
        run.work.symlink_to(tmp_path / "disk")
    assert run(run.out, "env").returncode == 0
    assert f"{run.work.resolve().name}/env.log" in names(run.out / "gpu.tgz")


@pytest.mark.parametrize("file", ["gpu.tgz", "summary.json"])
def test_results_that_cannot_be_written_are_no_success(run, file):
    (run.out / file).mkdir(parents=True)
    done = run(run.out, "env")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"could not all be written; the results are in {run.work}")
    assert "results:" not in done.stdout


def test_a_call_ends_within_ten_minutes():
    table = re.search(r"PARTS='\n(.*?)'", SCRIPT.read_text(), re.DOTALL)[1]
    rows = {name: (int(expected), int(limit)) for name, expected, limit in map(str.split, table.splitlines())}
    assert [*rows] == ["wheels", "build", "env", "warm", *PARTS[2:3], *PARTS[4:]]
    assert all(expected < limit <= TOTAL for expected, limit in rows.values())
    grace = int(re.search(r"GRACE=(\d+)", SCRIPT.read_text())[1])
    assert TOTAL + grace <= 565  # of 600: an archive is left to write
    first = ("wheels", "build", "env", "tests", "ladder", "ops")
    assert sum(rows[name][0] for name in first) < TOTAL  # one call
    assert rows["budget"][0] + rows["build"][0] + rows["wheels"][0] < TOTAL  # another


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--dryrun"], {}, r"the option --dryrun is unknown; expected \S+ \[--dry-run\] \[OUT \[PART...\]\]"),
        (["one", "two"], {}, "there is no part two; expected wheels build env warm tests ladder .*"),
        (["--dry-run"], {"PYTHON": "/no/python"}, "PYTHON is no interpreter; set it to one"),
        ([], {"NO_GPU": "1"}, "torch finds no GPU here; pass --dry-run to prove paths and options alone"),
        (["/dev/null/out"], {}, "/dev/null/out cannot be made; expected a folder"),
        ([], {"SELFNPO_COMMIT": 'it"s'}, 'SELFNPO_COMMIT is it"s; expected a hash'),
        ([], {"EARLIER": "/no.tgz"}, "EARLIER is /no.tgz, which cannot be unpacked; expected a gpu.tgz"),
    ],
)
def test_mistakes(run, tmp_path, arguments, environment, message):
    done = run(*(arguments or [run.out]), **environment)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {message}", done.stderr.splitlines()[-1])
    assert done.stdout == ""
    assert run.calls() == []


COLLECT = """
import shlex, sys, pytest
for line in sys.stdin.read().splitlines():
    code = pytest.main([*shlex.split(line), "-p", "no:cacheprovider"])
    if code:
        sys.exit(f"exit code {code}: {line}")
"""


def test_a_dry_run_proves_paths_and_options(run):
    """Its calls, one after the other in one process, because importing takes longest."""
    run("--dry-run", run.out)
    tests = [line.removeprefix("-m pytest ") for line in run.calls() if line.startswith("-m pytest ")]
    assert len(tests) == len(BENCHMARKS) + 2
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], input="\n".join(tests), capture_output=True, text=True, cwd=ROOT, env=inherited,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert len(re.findall(r"[1-9]\d*(/\d+)? tests? collected", done.stdout)) == len(tests)
    budget = [line.split()[2:] for line in run.every_call() if "budget_run" in line]
    parsed = [parse(BudgetRun, [word for word in words if word != "--help"]) for words in budget]
    assert sorted(each.max_train_steps for each in parsed) == [12, 1000]
