"""python -m benchmarks.pages: the tables and pictures of README.md and docs/, from results files and the evaluation's.

A generated part is enclosed by two comments. The first one says what it shows:

    <!-- table ladder; columns: step, speed; rows: full -->
    <!-- picture ladder -->
    <!-- reports -->
    <!-- evaluation -->
    ...
    <!-- end -->

`columns` lists the columns to show in addition to those that name rows; the default is all. `rows` keeps rows with this text
in one of their names. For every device the newest file under version control is used, GPUs first.
"""

import os
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
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("benchmarks.md", "kernels.md", "evaluation/README.md"))]
EVALUATION = ROOT / "docs" / "evaluation" / "evaluation.json"
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


def table(wanted: str, page: Path) -> str:
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


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def picture(name: str, page: Path) -> str:
    found = ((path, load(path)["tables"].get(name)) for path in files())
    return "\n\n".join(
        f"![{each['title']}]({_link(path.with_name(f'{path.stem}-{name}.png'), page)})" for path, each in found if each
    )


def reports(_: str, page: Path) -> str:
    return "\n".join(
        f"- [{load(path)['environment']['device']}]({_link(path.with_suffix('.md'), page)})" for path in files()
    )


def evaluation(_: str, page: Path) -> str:
    return difference_table(load_evaluation(EVALUATION))


def generated(page: Path, text: str) -> str:
    """`text` of a page with its tables and pictures regenerated."""
    makers = {"table": table, "picture": picture, "reports": reports, "evaluation": evaluation}

    def replaced(match: re.Match[str]) -> str:
        begin, kind, wanted, _, end = match.groups()
        return f"{begin}\n{makers[kind](wanted or '', page)}\n\n{end}"

    return BLOCK.sub(replaced, text)


def main() -> None:
    for page in PAGES:
        write_text(page, generated(page, page.read_text()))


if __name__ == "__main__":
    run(main)
