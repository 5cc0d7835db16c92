"""Results files, what is made of them, and that the tables of README and docs are theirs."""

import json
import math
import re

import pytest

from benchmarks import compare, pages, report, results
from benchmarks.plots import PLOTS, records
from benchmarks.tables import COUNTED, MEASURED, PREDICTED, PUBLISHED, TABLES, to_markdown
from selfnpo.demo.config import CFG, SELF_NPO
from selfnpo.demo.evaluation import load as load_evaluation
from selfnpo.errors import UserError

COMMITTED = pages.tracked()


def a_row(milliseconds=10.0, noise=1.0, model="m"):
    return {
        "model": model,
        "latents": "8x8",
        "batch": 4,
        "sequential, ms": [0.99 * milliseconds, milliseconds, 1.01 * milliseconds],
        "noise, %": noise,
    }


@pytest.fixture
def saved(tmp_path):
    """A results file with one table of one row."""

    def save(name="old", environment=None, **row):
        path = results.save({"tandem": results.table("tandem", [a_row(**row)], {"matmul FLOP/s": [1e9]})}, tmp_path / name)
        if environment:
            content = json.loads(path.read_text())
            content["environment"] |= environment
            path.write_text(json.dumps(content))
        return path

    return save


def test_every_figure_has_a_unit_and_a_kind():
    for table in TABLES.values():
        for column in table.columns:
            assert bool(column.unit) == bool(column.kind), column
            assert column.kind in ("", MEASURED, COUNTED, PREDICTED, PUBLISHED)
        names = [(column.name, column.unit) for column in table.columns]
        assert len(names) == len(set(names))
        assert table.source.startswith(("pytest benchmarks/", "make ", "python -m benchmarks."))


def test_a_file_keeps_the_tables_of_a_day(saved, tmp_path, monkeypatch):
    path = saved()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-(unknown|[0-9a-f]{7})(-changed)?\.json", path.name)
    assert path.parent.name == re.sub(r"[^a-z0-9]+", "-", results.device().lower()).strip("-")
    scaling = results.table("scaling", [{"model": "m", "grows": "batch", "to": 1, "step, ms": [1.0, 2.0, 3.0]}], {})
    assert results.save({"scaling": scaling}, tmp_path / "old") == path
    saved(milliseconds=20.0)
    tables = results.load(path)["tables"]
    assert [*tables] == ["tandem", "scaling"]
    assert tables["tandem"]["rows"][0][3][1] == 20.0
    assert tables["scaling"]["measured_at"] == scaling["measured_at"]
    about = results.environment()
    monkeypatch.setattr(results, "environment", lambda: about | {"commit": "f" * 40, "changed files": []})
    other = results.save({"scaling": scaling}, tmp_path / "old")
    assert other != path
    assert other.name.endswith("-fffffff.json")
    later = json.loads(other.read_text())
    later["tables"]["scaling"]["measured_at"] = "2999-01-01T00:00:00+00:00"
    other.write_text(json.dumps(later))
    assert results.newest([path, other]) == other


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match=r"the table tandem has no columns \['speed, x'\]"):
        results.table("tandem", [a_row() | {"speed, x": 1}], {})


def test_markdown_tells_kinds_apart():
    row = {"model": "m", "weights": "full", "run": "pool", "step, ms": [1.0, 1234.5, 2000.0], "predicted step, ms": 0.0123}
    table = results.table("steps", [row | {"error of that, %": -12.3, "run, device-hours": 2}], {})
    header, _, line = to_markdown(table).splitlines()
    assert header == "| model | weights | run | step, ms | run, device-hours | *predicted step, ms* | *error of that, %* |"
    assert line == "| m | full | pool | 1230 | 2 | *0.0123* | *-12* |"  # medians; nothing of columns that are empty
    assert to_markdown(table, ("step",)).splitlines()[2] == "| m | full | pool | 1230 |"


def run_compare(*arguments, capsys):
    code = compare.main([str(each) for each in arguments])
    return code, capsys.readouterr().out


def test_what_a_comparison_flags(saved, capsys):
    old = saved(milliseconds=10.0)
    for name, row, code, said in (
        ("same", {}, 0, "1 times compared, 0 changed by more than the noise\n"),
        ("near", {"milliseconds": 11.9}, 0, "0 changed"),
        ("slower", {"milliseconds": 12.5}, 1, "| tandem / m / 8x8 / 4 / sequential | 10 | 12.5 | +25 | 20 |"),
        ("faster", {"milliseconds": 5.0}, 0, "| 10 | 5 | -50 | 20 |"),
        ("noisy", {"milliseconds": 12.5, "noise": 30.0}, 0, "0 changed"),
        ("another", {"milliseconds": 50.0, "model": "n"}, 0, "0 times compared"),
    ):
        found, output = run_compare(old, saved(name, **({"milliseconds": 10.0} | row)), capsys=capsys)
        assert (found, said in output) == (code, True), (name, output)
    short = saved("short", milliseconds=0.5)
    assert run_compare(short, saved("near short", milliseconds=0.7), capsys=capsys)[0] == 0
    found, output = run_compare(short, saved("slower short", milliseconds=0.8), capsys=capsys)
    assert (found, "| 0.5 | 0.8 | +60 | 50 |" in output) == (1, True), output


def test_what_a_comparison_refuses(saved, tmp_path):
    old, elsewhere = saved(), saved("elsewhere", environment={"device": "another"})
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("text")
    for arguments, message in (
        ((old, elsewhere), "on another; expected one device"),
        ((old,), "got 1 files; expected two"),
        ((old, tmp_path / "none.json"), "could not be read as JSON: .*No such file"),
        ((old, tmp_path / "text.json"), "could not be read as JSON"),
        ((old, tmp_path / "list.json"), "is not a results file; expected one of benchmarks/results"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main([str(each) for each in arguments])


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_pages_are_made_of_the_newest_results(page):
    text = page.read_text()
    assert pages.generated(page, text) == text, "stale: run make pages"
    assert pages.BLOCK.search(text)
    for begin, kind, _, content, _ in pages.BLOCK.findall(text):
        broken = text.replace(begin + content, begin + f"\nno {kind}\n\n")
        assert pages.generated(page, broken) == text


def test_the_readme_shows_one_ladder_and_one_roofline_and_no_table_of_numbers():
    shown = [f"{kind} {what}" for _, kind, what, _, _ in pages.BLOCK.findall(pages.PAGES[0].read_text())]
    assert shown == ["picture ladder", "picture ops"]


def test_figures_in_the_readmes_sentences_are_those_of_the_results():
    text = " ".join(pages.PAGES[0].read_text().split())
    evaluation = load_evaluation(pages.EVALUATION)
    ours, plain = (evaluation.estimate(arm, 2.0, "fd").mean for arm in (SELF_NPO, CFG))
    assert f"{ours:.1f} instead of {plain:.1f} at `guidance_scale=2`" in text
    (on_a_cpu,) = (path for path in pages.files() if results.load(path)["environment"]["gpu"] == "none")
    *_, last = records(results.load(on_a_cpu), "ladder")
    assert f"is {last['speed, x']:.1f} times as fast" in text


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_no_other_tables_of_numbers(page):
    for line in pages.BLOCK.sub("", page.read_text()).splitlines():
        if line.startswith("|"):
            assert not re.search(r"\d ?(ms|GB/s|%|hours)|\dx\b", line), line


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_whole(path, tmp_path):
    content = results.load(path)
    about = content["environment"]
    assert about["changed files"] == []
    assert path.stem.endswith(about["commit"][:7])
    missing = (TABLES.keys() - {"overhead"}) ^ content["tables"].keys()  # which is in docs/overhead
    assert not missing or (about["gpu"] != "none" and missing < TABLES.keys())  # a GPU is rented for some of them
    for name, table in content["tables"].items():
        assert table["rows"], name
        assert [(column["unit"] != "") for column in table["columns"]] == [
            column["kind"] != "" for column in table["columns"]
        ]
        for row in table["rows"]:
            for column, value in zip(table["columns"], row, strict=True):
                for number in value if isinstance(value, list) else [value]:
                    assert not column["kind"] or number is None or math.isfinite(number), (name, column, row)
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    written = report.write(copy)
    assert [each.suffix for each in written] == [".md", *(".png" for name in content["tables"] if name in PLOTS)]
    assert all(each.stat().st_size > 10_000 for each in written[1:])
    assert written[0].read_text() == path.with_suffix(".md").read_text(), "stale: run python -m benchmarks.report"
    text = written[0].read_text()
    for table in content["tables"].values():
        assert f"## {table['title']}" in text
        assert f"`{table['source']}`" in text
    assert text.count(f" on {about['device']}, torch {about['torch']}") == sum(
        any(column["kind"] == MEASURED for column in table["columns"]) for table in content["tables"].values()
    )
    assert ("*italics: predicted*" in text) == any(
        column["kind"] == PREDICTED for table in content["tables"].values() for column in table["columns"]
    )


def test_there_is_a_report():
    assert COMMITTED
