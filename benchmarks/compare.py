"""python -m benchmarks.compare OLD.json NEW.json: the times that changed by more than both runs' noise.

The exit code is 1 if something became slower, otherwise 0.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import load
from benchmarks.tables import key
from selfnpo.budget.cost import digits
from selfnpo.cli import run
from selfnpo.errors import UserError

# Shares by which two runs of the same commit may differ on a shared machine. Calls shorter than SHORT milliseconds also
# depend on where their memory happens to be allocated.
FLOOR, SHORT_FLOOR, SHORT = 0.2, 0.5, 1.0


@dataclass(frozen=True)
class Change:
    figure: tuple[str, ...]  # table, row and column
    old: float  # ms
    new: float
    noise: float  # relative change that may be chance

    @property
    def share(self) -> float:
        return self.new / self.old - 1

    @property
    def is_certain(self) -> bool:
        return abs(self.share) > self.noise


def times(results: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], list[float], float]]:
    """Every figure with quartiles, and its noise: that of its row plus half the distance between its quartiles."""
    for name, table in results["tables"].items():
        columns = [column["name"] for column in table["columns"]]
        for row in table["rows"]:
            of_row = row[columns.index("noise")] if "noise" in columns else None
            for column, value in zip(table["columns"], row, strict=True):
                if isinstance(value, list):
                    low, median, high = value
                    spread = (high - low) / median / 2
                    yield (name, *key(table, row), column["name"]), value, (of_row or 0) / 100 + spread


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The changes of all figures that both files have."""
    before = {figure: (value, noise) for figure, value, noise in times(old)}
    found = []
    for figure, value, noise in times(new):
        if figure in before:
            known, known_noise = before[figure]
            floor = SHORT_FLOOR if known[1] < SHORT else FLOOR
            found.append(Change(figure, known[1], value[1], max(floor, noise + known_noise)))
    return found


def table(found: list[Change]) -> str:
    certain = sorted((change for change in found if change.is_certain), key=lambda change: -change.share)
    lines = [f"{len(found)} times compared, {len(certain)} changed by more than the noise"]
    if certain:
        lines += ["", "| figure | old, ms | new, ms | change, % | noise, % |", "| --- | --- | --- | --- | --- |"]
    for change in certain:
        cells = " / ".join(change.figure), digits(change.old), digits(change.new)
        lines.append(f"| {' | '.join(cells)} | {100 * change.share:+.0f} | {100 * change.noise:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        raise UserError(f"got {len(arguments)} files; expected two: python -m benchmarks.compare OLD.json NEW.json")
    old, new = (load(Path(argument)) for argument in arguments)
    devices = [results["environment"]["device"] for results in (old, new)]
    if devices[0] != devices[1]:
        raise UserError(f"{arguments[0]} was measured on {devices[0]}, {arguments[1]} on {devices[1]}; expected one device")
    found = changes(old, new)
    print(table(found))
    return int(any(change.is_certain and change.share > 0 for change in found))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
