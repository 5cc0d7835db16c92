"""benchmarks/run_gpu.sh with an interpreter that is pretended: what runs, what is skipped, what a call survives."""

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
TABLE = re.findall(r"^([a-z][\w-]*) +(\d+) +(\d+)$", SCRIPT.read_text(), re.MULTILINE)  # name, expected, limit
PARTS = {name for name, *_ in TABLE} - {"wheels"}  # which are installed where there are some
COMMITS = "a" * 40, "b" * 40
PRETENDED = """#!/bin/sh
case "$*" in
*sys.executable*) echo "$0"; exit ;;
*is_available*) exit "${NO_GPU:-0}" ;;
esac
trap 'kill $!; echo interrupted; exit 1' INT
echo "$@" >>"$(dirname "$0")/calls"
case "$*" in
*"${FAILING:-nothing}"*) echo why; exit "${CODE:-3}" ;;
*"${LASTING:-nothing}"*) sleep 600 & wait ;;
esac
"""


class Runs:
    """Runs of a script, which is `run` unless it is changed."""

    def __init__(self, folder: Path):
        self.python, self.out, self.work, self.script = folder / "python", folder / "out", folder / "work", SCRIPT
        (folder / "disk" / "site").mkdir(parents=True)
        self.work.symlink_to(folder / "disk" / "site")  # a name that a folder within has, too
        self.python.write_text(PRETENDED)
        self.python.chmod(0o755)

    def __call__(self, *arguments: str | Path, **environment: str | Path) -> subprocess.CompletedProcess:
        started = self.start(signal.SIG_IGN, *arguments, **environment)  # as in the background of a shell
        said = started.communicate()
        return subprocess.CompletedProcess(started.args, started.returncode, *said)

    def start(self, on_interrupt: int, *arguments: str | Path, **environment: str | Path) -> subprocess.Popen:
        (self.python.parent / "calls").write_text("")
        words = {"PYTHON": self.python, "WORK": self.work, "SELFNPO_COMMIT": COMMITS[0]} | environment
        return subprocess.Popen(
            ["bash", self.script, *(arguments or [self.out])], env=without_pytest() | {k: str(v) for k, v in words.items()},
            preexec_fn=lambda: signal.signal(signal.SIGINT, on_interrupt), stdout=-1, stderr=-1, text=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        return (self.python.parent / "calls").read_text().splitlines()

    def outcomes(self) -> dict[str, str]:
        return {row["part"]: row["outcome"] for row in json.loads((self.out / "summary.json").read_text())["parts"]}

    def archived(self) -> set[str]:
        with tarfile.open(self.out / "gpu.tgz") as archive:
            return {name.partition("/")[2] for name in archive.getnames()}


def without_pytest() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


@pytest.fixture
def run(tmp_path):
    return Runs(tmp_path)


def test_every_part_passes_and_is_archived_without_what_belongs_to_this_machine(run):
    (run.work / "site").mkdir()
    assert run().returncode == 0
    assert run.outcomes() == dict.fromkeys(PARTS, "passed")
    assert len(run.calls()) == len(PARTS)
    assert run.archived() >= {f"{part}.log" for part in PARTS} | {"ops.done"}
    assert not run.archived() & {"build.done", "env.done", "site"}
    (budget,) = (re.search(r"--max_seconds=(\d+)", line) for line in run.calls() if "max_seconds" in line)
    assert 300 < int(budget[1]) < 500  # time is left to save what it has


@pytest.mark.parametrize(("code", "outcome"), [(3, "failed"), (75, "unfinished")])
def test_a_part_that_fails_stops_nothing_and_is_all_that_runs_again(run, code, outcome):
    done = run(FAILING="bench_ops", CODE=code)
    assert done.returncode == 1
    assert run.outcomes() == dict.fromkeys(PARTS, "passed") | {"ops": outcome}
    assert "    why\n" in done.stdout
    assert run().returncode == 0
    assert ["bench_ops" in line for line in run.calls()] == [True]
    assert set(run.outcomes().values()) == {"passed"}


def test_what_passed_stands_for_one_commit_and_no_dry_run_for_a_run(run):
    assert run("--dry-run", run.out, NO_GPU=1).returncode == 0
    for commit, calls in ((COMMITS[0], len(PARTS)), (COMMITS[0], 0), (COMMITS[1], len(PARTS))):
        assert run(SELFNPO_COMMIT=commit).returncode == 0
        assert len(run.calls()) == calls


def test_a_new_machine_goes_on_from_the_archive(run, tmp_path):
    run(FAILING="bench_ops")
    archive = (run.out / "gpu.tgz").rename(tmp_path / "earlier.tgz")
    run.work = tmp_path / "another"
    assert run(EARLIER=archive).returncode == 0
    assert [line.split()[-1] for line in run.calls()[:2]] == [".", "selfnpo.env"]  # of the machine: built and looked at
    assert ["bench_ops" in line for line in run.calls()[2:]] == [True]


def test_parts_that_are_asked_for(run):
    assert run(run.out, "budget", "ops").returncode == 0
    assert [*run.outcomes()] == ["build", "ops", "budget"]


def test_wheels_are_installed_for_the_script_alone(run, tmp_path):
    (tmp_path / "one.whl").touch()
    assert run(run.out, "env", WHEELS=tmp_path).returncode == 0
    assert run.calls()[0].endswith(f" --target {run.work.resolve()}/site {tmp_path}/one.whl")


def test_a_part_that_outlasts_its_limit_is_interrupted_and_one_without_time_left_not_begun(run, tmp_path):
    run.script = tmp_path / "benchmarks" / SCRIPT.name
    run.script.parent.mkdir()
    table = {"env": "env 1 1", "ladder": "ladder 99999 99999"}
    changed = re.sub(r"^(env|ladder) .*", lambda row: table[row[1]], SCRIPT.read_text(), flags=re.MULTILINE)
    run.script.write_text(changed)
    assert run(LASTING="selfnpo.env").returncode == 1
    assert run.outcomes() == dict.fromkeys(PARTS, "passed") | {"env": "timed out", "ladder": "not started"}
    assert (run.work / "env.log").read_text() == "interrupted\n"  # so it could write what it had


def test_an_interrupt_ends_the_part_that_runs_and_keeps_what_is_known(run):
    running = run.start(signal.SIG_DFL, LASTING="selfnpo.env")
    while not any("selfnpo.env" in line for line in run.calls()):
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    running.communicate()
    assert running.returncode == 130
    assert run.outcomes() == {"build": "passed"}
    assert {"build.log", "env.log"} <= run.archived()


@pytest.mark.parametrize("file", ["gpu.tgz", "summary.json"])
def test_results_that_cannot_be_written_are_no_success(run, file):
    (run.out / file).mkdir(parents=True)
    done = run(run.out, "env")
    assert done.returncode == 1
    assert f"could not all be written; the results are in {run.work.resolve()}" in done.stderr


def test_a_call_ends_within_ten_minutes():
    total, grace = (int(re.search(rf"{name}=(\d+)", SCRIPT.read_text())[1]) for name in ("TOTAL", "GRACE"))
    assert total + grace <= 565  # of 600: an archive is left to write
    assert all(int(expected) < int(limit) <= total for _, expected, limit in TABLE)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--dryrun"], {}, "the option --dryrun is unknown; expected benchmarks/run_gpu.sh [--dry-run] [OUT [PART...]]"),
        (["one", "two"], {}, "there is no part two; expected wheels build env warm tests ladder "),
        (["--dry-run"], {"PYTHON": "/no/python"}, "PYTHON is no interpreter; set it to one"),
        ([], {"NO_GPU": "1"}, "torch finds no GPU here; pass --dry-run to prove paths and options alone"),
        ([], {"WHEELS": "/proc"}, "WHEELS is /proc, which has no wheels"),
        (["/dev/null/out"], {}, "/dev/null/out cannot be made; expected a folder"),
        ([], {"SELFNPO_COMMIT": 'it"s'}, 'SELFNPO_COMMIT is it"s; expected a hash'),
        ([], {"EARLIER": "/no.tgz"}, "EARLIER is /no.tgz, which cannot be unpacked; expected a gpu.tgz"),
    ],
)
def test_mistakes(run, arguments, environment, message):
    done = run(*arguments, **environment)
    assert (done.returncode, done.stdout, run.calls()) == (2, "", [])
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")


COLLECT = """
import shlex, sys, pytest
for line in sys.stdin.read().splitlines():
    code = pytest.main([*shlex.split(line), "-p", "no:cacheprovider"])
    if code:
        sys.exit(f"exit code {code}: {line}")
"""


def test_a_dry_run_proves_paths_and_options(run):
    """Its calls, one after the other in one process, because importing takes longest."""
    assert run("--dry-run", run.out).returncode == 0
    assert not any("pip" in line for line in run.calls())
    tests = [line.removeprefix("-m pytest ") for line in run.calls() if line.startswith("-m pytest ")]
    collect = [sys.executable, "-c", COLLECT]
    done = subprocess.run(collect, input="\n".join(tests), capture_output=True, text=True, cwd=ROOT, env=without_pytest())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert len(re.findall(r"[1-9]\d*(/\d+)? tests? collected", done.stdout)) == len(tests) == len(PARTS) - 4
    budget = [line.split()[2:] for line in run.calls() if "budget_run" in line]
    parsed = [parse(BudgetRun, [word for word in words if word != "--help"]) for words in budget]
    assert sorted(each.max_train_steps for each in parsed) == [12, 1000]
