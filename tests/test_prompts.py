"""Prompts from every source, each once and in order."""

import json
import sys

import pytest

from selfnpo.errors import UserError
from selfnpo.prompts import read_prompts


@pytest.fixture
def written(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_no_prompts_are_the_empty_prompt():
    assert read_prompts("none") == [""]


def test_a_text_file(written):
    assert read_prompts(written("p.txt", "\ufeffa cat\n\n  ein Bär \r\na cat\n")) == ["a cat", "ein Bär"]


def test_json_lines(written):
    lines = [{"prompt": "a cat", "text": "x"}, {"text": "a dog"}, {"caption": "Ärger", "n": 1}, "plain"]
    path = written("p.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_prompts(path) == ["a cat", "a dog", "Ärger", "plain"]


@pytest.mark.parametrize(("name", "text"), [("p.jsonl", '{"a": "x"}\n{"a": "y"}\n{"a": "x"}\n'), ("p.csv", "a,b\nx,1\ny,2\n")])
def test_a_column_of_a_dataset(written, name, text):
    assert read_prompts("none", f"{written(name, text)}:a") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("{}:c", "has no column c; expected one of a, b"),
        ("{}:b", "holds other things than text"),
        ("{}", "expected NAME:COLUMN"),
        ("nobody/nothing:a", "dataset nobody/nothing could not be loaded"),
    ],
)
def test_mistakes_with_datasets(written, name, sentence):
    path = written("p.csv", "a,b\nx,1\n")
    name = name.format(path) if ":" in name else "prompts.csv"
    with pytest.raises(UserError, match=sentence):
        read_prompts("none", name, local_files_only=True)


def test_one_source_at_a_time(written):
    with pytest.raises(UserError, match="leave one of them out"):
        read_prompts(written("p.txt", "a"), "d:c")


def test_datasets_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'selfnpo\[datasets\]'"):
        read_prompts("none", "d:c")
