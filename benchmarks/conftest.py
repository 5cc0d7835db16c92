"""Saves the rows that benchmarks record to a results file at once; prints a report with pictures at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import heap, report, results
from selfnpo.errors import UserError

SAVED = pytest.StashKey[dict[Path, set[str]]]()  # results file -> names of the tables that got rows


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=results.RESULTS, help="folder of results files")


def pytest_configure(config):
    try:
        results.check_folder(config.getoption("--results"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SAVED] = {}
    heap.keep()


def pytest_collection_modifyitems(items):
    """Run the ops first: other benchmarks fragment the heap, so that large results cannot reuse memory."""
    items.sort(key=lambda item: item.path.stem != "bench_ops")


def pytest_pyfunc_call(pyfuncitem):
    """Run each benchmark once, so that pytest-benchmark's own table shows how long it took."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    pyfuncitem.funcargs["benchmark"].pedantic(pyfuncitem.obj, kwargs=arguments, rounds=1)
    return True


@pytest.fixture
def record(benchmark, pytestconfig) -> Callable[..., None]:
    """record(table, rows, ceilings): see `results.table`. Rows are saved at once, even if something fails later."""

    def add(name: str, rows: list[dict[str, Any]], ceilings: dict[str, float]) -> None:
        table = results.table(name, rows, {ceiling: [value] for ceiling, value in ceilings.items()})
        path = results.save({name: table}, pytestconfig.getoption("--results"))
        pytestconfig.stash[SAVED].setdefault(path, set()).add(name)

    return add


def pytest_terminal_summary(terminalreporter, config):
    for path, names in config.stash[SAVED].items():
        whole = results.load(path)
        tables = {name: table for name, table in whole["tables"].items() if name in names}
        terminalreporter.section("report")
        terminalreporter.write_line(report.to_markdown(whole | {"tables": tables}))
        terminalreporter.write_line(f"results: {path}")
        for written in report.write(path):
            terminalreporter.write_line(f"report: {written}")
