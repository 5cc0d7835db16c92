"""python -m benchmarks.readme: the tables of README.md, from results files and docs/evaluation/evaluation.json.

A table is enclosed by two comments. The first one says what it shows:

    <!-- table ladder; columns: step, speed; rows: full -->
    <!-- picture ladder -->
    <!-- reports -->
    <!-- evaluation -->
    ...
    <!-- end -->

`columns` lists the columns to show in addition to those that name rows; the default is all. `rows` keeps rows with this text
in one of their names. For every device the newest file under version control is used, GPUs first.
"""

import re
from itertools import groupby
from pathlib import Path

from benchmarks.report import provenance
from benchmarks.results import RESULTS, UNKNOWN, git, load, newest
from benchmarks.tables import key, to_markdown
from selfnpo.cli import run
from selfnpo.demo.evaluation import load as load_evaluation
from selfnpo.demo.report import difference_table
from selfnpo.files import write_text

ROOT = Path(__file__).parents[1]
README, EVALUATION = ROOT / "README.md", ROOT / "docs" / "evaluation" / "evaluation.json"
BLOCK = re.compile(r"(<!-- (table|picture|reports|evaluation)(?: ([^\n]*?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def tracked() -> list[Path]:
    """The results files under version control, or all of them in a copy without git."""
    listed = git("ls-files", "benchmarks/results/*.json")
    return sorted(RESULTS.glob("*/*.json") if listed == UNKNOWN else map(ROOT.joinpath, listed.splitlines()))


def files() -> list[Path]:
    """The newest results file of each device."""
    devices = groupby(tracked(), key=lambda path: path.parent)
    found = [newest([*paths]) for _, paths in devices]
    return sorted(found, key=lambda path: load(path)["environment"]["gpu"] == "none")


def table(wanted: str) -> str:
    name, *options = (part.strip() for part in wanted.split(";"))
    settings = dict(option.split(": ", 1) for option in options)
    parts = []
    for path in files():
        results = load(path)
        if found := results["tables"].get(name):
            rows = [row for row in found["rows"] if any(settings.get("rows", "") in part for part in key(found, row))]
            columns = tuple(filter(None, settings.get("columns", "").split(", ")))
            parts += [to_markdown(found | {"rows": rows}, columns), provenance(results, name)]
    return "\n\n".join(parts)


def picture(name: str) -> str:
    found = ((path, load(path)["tables"].get(name)) for path in files())
    return "\n\n".join(
        f"![{each['title']}]({path.relative_to(ROOT).with_name(f'{path.stem}-{name}.png')})" for path, each in found if each
    )


def reports(_: str) -> str:
    paths = [path.relative_to(ROOT).with_suffix(".md") for path in files()]
    return "\n".join(f"- [{load(ROOT / path.with_suffix('.json'))['environment']['device']}]({path})" for path in paths)


def evaluation(_: str) -> str:
    return difference_table(load_evaluation(EVALUATION))


def generated(text: str) -> str:
    """`text` with its tables regenerated."""
    makers = {"table": table, "picture": picture, "reports": reports, "evaluation": evaluation}

    def replaced(match: re.Match[str]) -> str:
        begin, kind, wanted, _, end = match.groups()
        return f"{begin}\n{makers[kind](wanted or '')}\n\n{end}"

    return BLOCK.sub(replaced, text)


def main() -> None:
    write_text(README, generated(README.read_text()))


if __name__ == "__main__":
    run(main)
