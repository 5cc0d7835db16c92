"""What benchmarks report: rows of tables, kept in a results file and printed, with pictures, at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import heap, report, results
from selfnpo.errors import UserError


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=results.RESULTS, help="folder of results files")


def pytest_configure(config):
    try:
        results.check_folder(config.getoption("--results"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    heap.keep()


def pytest_collection_modifyitems(items):
    """The ops first, for the heap that others leave is in pieces, in which large results find no place twice."""
    items.sort(key=lambda item: item.path.stem != "bench_ops")


@pytest.fixture
def record(benchmark) -> Callable[..., None]:
    """record(table, rows, ceilings): see `results.table`."""

    def add(name: str, rows: list[dict[str, Any]], ceilings: dict[str, float]) -> None:
        benchmark.extra_info.setdefault("tables", {})[name] = {"rows": rows, "ceilings": ceilings}

    return add


def collected(benchmarks: list[Any]) -> dict[str, dict[str, Any]]:
    """Tables of what several benchmarks recorded."""
    found: dict[str, dict[str, Any]] = {}
    for bench in benchmarks:
        for name, part in bench.extra_info.get("tables", {}).items():
            whole = found.setdefault(name, {"rows": [], "ceilings": {}})
            whole["rows"] += part["rows"]
            for ceiling, value in part["ceilings"].items():
                whole["ceilings"].setdefault(ceiling, []).append(value)
    return {name: results.table(name, **parts) for name, parts in found.items()}


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    tables = collected(session.benchmarks) if session else {}
    if not tables:
        return
    path = results.save(tables, config.getoption("--results"))
    whole = results.load(path)
    written = report.write(path)
    terminalreporter.section("report")
    terminalreporter.write_line(report.to_markdown(whole | {"tables": {name: whole["tables"][name] for name in tables}}))
    terminalreporter.write_line(f"results: {path}")
    for picture in written:
        terminalreporter.write_line(f"report: {picture}")
