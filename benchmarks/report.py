"""python -m benchmarks.report RESULTS.json: writes a Markdown report with pictures next to it, as benchmarks do."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import PLOTS
from benchmarks.results import load
from benchmarks.tables import MEASURED, PREDICTED
from benchmarks.tables import to_markdown as table_to_markdown
from selfnpo.cli import run
from selfnpo.errors import UserError
from selfnpo.files import write_text


def where(environment: dict[str, Any]) -> str:
    """A description of the device and its software."""
    parts = [environment["device"], f"torch {environment['torch']}"]
    if environment["gpu"] != "none":
        parts += [f"driver {environment['driver']}", f"Triton {environment['triton']}"]
    return ", ".join(parts)


def provenance(results: dict[str, Any], name: str) -> str:
    """The line under a table: its kind, device, day, commit and command."""
    table, environment = results["tables"][name], results["environment"]
    changed = " with changes" if environment["changed files"] else ""
    if any(column["kind"] == MEASURED for column in table["columns"]):
        kind, device = "**Measured**", f" on {where(environment)}"
    else:
        kind, device = "**Counted**", ""
    predicted = "; *italics: predicted*" if any(column["kind"] == PREDICTED for column in table["columns"]) else ""
    made = f"{table['measured_at'][:10]}, commit {environment['commit'][:7]}{changed}"
    return f"{kind}{device}, {made}{predicted}: `{table['source']}`"


def to_markdown(results: dict[str, Any], pictures: dict[str, str] | None = None) -> str:
    """The whole report.

    Args:
        pictures: file names by table.
    """
    parts = [
        f"# Benchmarks: {results['environment']['device']}",
        "Times are medians of interleaved rounds. Noise is the difference between one function of a row and itself, timed "
        "twice. *What stands in italics was not measured but predicted.*",
    ]
    for name, table in results["tables"].items():
        parts += [f"## {table['title']}", provenance(results, name), table["legend"]]
        if pictures and name in pictures:
            parts.append(f"![{table['title']}]({pictures[name]})")
        parts.append(table_to_markdown(table))
    about = results["environment"]
    parts += ["## Environment", "\n".join(f"- {name}: {value}" for name, value in about.items())]
    return "\n\n".join(parts) + "\n"


def write(path: Path) -> list[Path]:
    """Render a results file. Returns the files written."""
    results = load(path)
    pictures = {name: path.with_name(f"{path.stem}-{name}.png") for name in PLOTS if name in results["tables"]}
    for name, picture in pictures.items():
        PLOTS[name](results, picture)
    text = path.with_suffix(".md")
    write_text(text, to_markdown(results, {name: picture.name for name, picture in pictures.items()}))
    return [text, *pictures.values()]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise UserError(f"got {len(arguments)} arguments; expected one results file: python -m benchmarks.report FILE")
    for path in write(Path(arguments[0])):
        print(path)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
