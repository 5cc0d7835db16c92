"""Results files: benchmarks/results/<device>/<date>-<commit>.json, one per device, day and commit.

    environment   what it ran on, with versions and clocks
    tables        name -> title, legend, source, measured_at, columns (name, unit, kind), rows, ceilings

A row is a list with one value per column; a time is given by its quartiles. A later run on the same day replaces the rows
that it measures again. In a copy without git, set SELFNPO_COMMIT to the commit's hash, followed by -changed if files differ.
"""

import json
import os
import re
import subprocess
import tempfile
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import TABLES, key, label
from selfnpo.device import cpu_name
from selfnpo.env import installation
from selfnpo.errors import UserError, first_line
from selfnpo.files import write_text

RESULTS = Path(__file__).parent / "results"
UNKNOWN, CHANGED = "unknown", "-changed"


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name().replace("(R)", "")


def git(*command: str) -> str:
    """The output of a git command in this copy, or UNKNOWN without git."""
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    except FileNotFoundError:
        return UNKNOWN
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN


@cache
def checkout() -> tuple[str, list[str]]:
    """Commit and changed files, read once: commits made later are not what this process measures."""
    changed = git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
    return git("rev-parse", "HEAD"), changed.splitlines()


def environment() -> dict[str, Any]:
    commit, changed = checkout()
    if told := os.environ.get("SELFNPO_COMMIT"):
        commit, changed = told.removesuffix(CHANGED), ["unknown ones"] if told.endswith(CHANGED) else []
    found = installation() | {"device": device(), "commit": commit, "changed files": changed}
    return found | (_clocks() if torch.cuda.is_available() else {})


def _clocks() -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    return {
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        "cudnn": str(torch.backends.cudnn.version()),
        "clocks MHz": {
            "sm": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "sm max": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        },
    }


def table(name: str, rows: list[dict[str, Any]], ceilings: dict[str, list[float]]) -> dict[str, Any]:
    """A table in the form of a results file.

    Args:
        rows: values by column label.
    """
    about = TABLES[name]
    columns = [vars(column) for column in about.columns]
    named = [*map(label, columns)]
    for row in rows:
        if unknown := row.keys() - set(named):
            raise ValueError(f"the table {name} has no columns {sorted(unknown)}; it has {named}")
    return {
        "title": about.title,
        "legend": about.legend,
        "source": about.source,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "columns": columns,
        "rows": [[row.get(each) for each in named] for row in rows],
        "ceilings": ceilings,
    }


def check_folder(folder: Path) -> None:
    """Called before anything is measured.

    Raises:
        UserError: results cannot be written there.
    """
    checkout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--results {folder} cannot be written: {error.strerror or error}; choose another folder") from error


def _path(folder: Path, about: dict[str, Any], day: str) -> Path:
    commit = about["commit"][:7] + (CHANGED if about["changed files"] else "")
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return folder / slug / f"{day}-{commit}.json"


def rows_before(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of a table, by column label, from the newest file of this device and commit that has it."""
    pattern = _path(folder, environment(), "[0-9]" * 4 + "-*")
    for file in sorted(pattern.parent.glob(pattern.name), reverse=True):
        if found := load(file)["tables"].get(name):
            return [dict(zip(map(label, found["columns"]), row, strict=True)) for row in found["rows"]]
    return []


def save(tables: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write tables to the file of this device, day and commit. Returns its path."""
    about = environment()
    path = _path(folder, about, f"{datetime.now(timezone.utc):%Y-%m-%d}")
    known = load(path)["tables"] if path.exists() else {}
    merged = known | {name: _joined(known.get(name), new) for name, new in tables.items()}
    ordered = {name: merged[name] for name in TABLES if name in merged}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"environment": about, "tables": ordered}, indent=1) + "\n")
    return path


def _joined(known: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new`, plus the rows of `known` that it lacks, and the ceilings of both."""
    if known is None or known["columns"] != new["columns"]:
        return new
    now = {key(new, row): row for row in new["rows"]}
    rows = [now.pop(key(known, row), row) for row in known["rows"]] + [*now.values()]
    names = {*known["ceilings"], *new["ceilings"]}
    both = {name: known["ceilings"].get(name, []) + new["ceilings"].get(name, []) for name in sorted(names)}
    ceilings = {name: [*dict.fromkeys(values)] for name, values in both.items()}  # without duplicates: rows share a ceiling
    return new | {"rows": rows, "ceilings": ceilings}


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        UserError: it cannot be read, or is not a results file.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} could not be read as JSON: {first_line(error)}") from error
    if not isinstance(results, dict) or results.keys() != {"environment", "tables"}:
        raise UserError(f"{path} is not a results file; expected one of benchmarks/results/<device>/<date>-<commit>.json")
    return results


def newest(paths: list[Path]) -> Path:
    """The results file that was measured last."""
    return max(paths, key=lambda path: max(each["measured_at"] for each in load(path)["tables"].values()))
