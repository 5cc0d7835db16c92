"""python tests/compat.py [ROW ...]: the kernel and step tests under the oldest and the newest supported torch and Triton.

Every row gets an environment of its own under .compat/ (several GB each, for these are CUDA builds). The results go to
docs/compatibility.md. Exit code 1 where a row fails.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = [
    "tests/kernels", "tests/training/test_whole_step.py", "tests/training/test_capture.py", "tests/training/test_economy.py",
    "tests/training/test_families.py",
]  # fmt: skip
OLDEST, NEWEST = "oldest", "newest"
# What a row fixes. The rest comes from constraints.txt, for the oldest row from the floors in pyproject.toml, and for the
# newest row from nothing: it gets what `pip install .` gets on that day. The interpreter of Triton 3.6, which only tests
# use, fails on numpy 2.4.
ROWS = {
    OLDEST: ["numpy<2.4"],
    "2.11": ["torch==2.11.0", "triton==3.6.0", "numpy<2.4"],
    "2.13": ["torch==2.13.0", "triton==3.7.1"],
    NEWEST: [],
}
SHOWN = ["torch", "triton", "diffusers", "transformers", "accelerate", "peft"]


def requirements(row: str) -> list[str]:
    """What pyproject.toml asks for, in the versions of a row, for pip."""
    names, found = {_name(pin) for pin in ROWS[row]}, [*ROWS[row]]
    for line in importlib.metadata.requires("selfnpo"):
        package, _, marker = (part.strip() for part in line.partition(";"))
        if row == OLDEST and "extra" not in marker:
            package = package.replace(">=", "==")
        if _name(package) not in names and ("extra" not in marker or "dev" in marker):
            found.append(package)
    return found


def _name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


def environment(row: str) -> Path:
    """Its interpreter, with everything installed."""
    folder = ROOT / ".compat" / row
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        if row not in (OLDEST, NEWEST):
            lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
            constraints.writelines(
                line for line in lines if "==" in line and _name(line) not in {*map(_name, ROWS[row]), "triton"}
            )
            constraints.flush()
        command = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *requirements(row)]
        subprocess.run(command, check=True)
    return python


def tested(row: str) -> dict[str, str]:
    """The cells of a row of the table."""
    python, started = environment(row), time.time()
    command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    print(done.stdout[-3000:], flush=True)
    outcome = re.search(r"^(?:=* )?(\d+ (?:passed|failed).*?)(?: in [\d.]+s.*)?$", done.stdout, re.MULTILINE)
    code = f"import importlib.metadata as m; print(*map(m.version, {SHOWN}))"
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    result = re.sub(r", \d+ warnings?", "", outcome[1]) if outcome else "did not run"
    cells = dict(zip(SHOWN, versions, strict=True))
    return (
        {"row": row, "python": sys.version.split()[0]}
        | cells
        | {
            "result": result if done.returncode == 0 else f"**{result}**",
            "day": str(date.today()),
            "minutes": f"{(time.time() - started) / 60:.0f}",
        }
    )


def known() -> dict[str, list[str]]:
    """Rows of the page as it is."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: cells for cells in rows if cells[0] in ROWS}


def main(names: list[str]) -> int:
    if unknown := set(names) - set(ROWS):
        print(f"error: got {', '.join(sorted(unknown))}; expected some of {', '.join(ROWS)}", file=sys.stderr)
        return 2
    rows = known()
    for name in names or ROWS:
        cells = tested(name)
        rows[name] = [*cells.values()]
        header = [*cells]
        lines = [header, ["---"] * len(header), *(rows[name] for name in ROWS if name in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        PAGE.write_text(TEXT.format(table=table, tests=" ".join(TESTS)))
    return int(any("**" in cells[len(SHOWN) + 2] for cells in rows.values()))


TEXT = """# Compatibility

`pip install .` takes the newest release of every dependency, which may be newer than anything in the table below.
`pip install -c constraints.txt .` takes the versions that all tests run with, on Python 3.11 and later. If a newer release
fails, that is the first thing to try.

`make compat` installs the oldest and the newest supported releases, each in an environment of its own, and runs the kernel
and step tests there: every op against its reference, every Triton launch compiled as the JIT does it for sm_80, sm_90 and
sm_100, and whole training steps in float32, bf16 and fp16, compiled or not, full weights and LoRA. `oldest` has the lowest
versions that pyproject.toml allows, `newest` what pip found on that day. Last results, on a CPU:

{table}

The tests: `pytest {tests}`.

## Python and wheels

`make wheel` builds for one Python, `make wheel PYTHON=python3.12` for another: pybind11 3.1 does not support Python's stable
ABI, so every Python from 3.10 on needs a wheel of its own. The wheel asks for the glibc of the machine that builds it or a
newer one, and for no compiler. It shares the libgomp that torch brings, so kernels and torch use one pool of threads.

On 2026-11-28 such wheels were installed into empty environments, with no compiler and no cmake on the path, and with the
dependencies that pip chose (on 3.11, those of constraints.txt). The kernels ran there, with the same bits on one and on two
threads:

| Python | torch | triton | diffusers | transformers | numpy |
| --- | --- | --- | --- | --- | --- |
| 3.10.13 | 2.14.1 | 3.8.0 | 0.41.0 | 5.20.2 | 2.2.6 |
| 3.11.7 | 2.13.0+cpu | 3.7.1 | 0.42.1 | 5.23.0 | 2.4.6 |
| 3.12.1 | 2.14.1 | 3.8.0 | 0.42.1 | 5.24.0 | 2.5.5 |
| 3.13.0 | 2.14.1 | 3.8.0 | 0.42.1 | 5.24.0 | 2.5.5 |

`pip install .` was tried with pip 20.3, 21.2, 21.3, 22.3 and 23.2; `pip install -e .` needs pip 21.3 or newer.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
