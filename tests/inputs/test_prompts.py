"""Prompts from every source, each once and in order."""

import json
import logging
import sys

import datasets
import pytest
from huggingface_hub import HfApi
from transformers import CLIPTokenizer, T5Tokenizer

from selfnpo.errors import UserError
from selfnpo.inputs.prompts import read_prompts
from selfnpo.models.loading import too_long


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def written(tmp_path):
    def write(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


def test_no_prompts_are_the_empty_prompt():
    assert read_prompts("none") == [""]


def test_a_text_file(written):
    assert read_prompts(written("p.txt", "\ufeffa cat\n\n  ein Bär \r\na cat\n")) == ["a cat", "ein Bär"]


def test_json_lines(written):
    lines = [{"prompt": "a cat", "text": "x"}, {"text": "a dog"}, {"caption": "Ärger", "n": 1}, "plain", {"text": " a cat"}]
    path = written("p.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_prompts(path) == ["a cat", "a dog", "Ärger", "plain"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.txt", " \n\n", "p.txt has no prompts; expected one per line, or --prompts none"),
        ("p.txt", b"a\n\xff\xfe\n", "line 2 of .*p.txt is not UTF-8 text; convert the file to UTF-8"),
        ("p.jsonl", '"a"\n\n{"prompt": \n', "line 3 of .*p.jsonl is not valid JSON: .*; expected one object per line"),
        ("p.jsonl", '{"name": "a"}', "line 1 of .*p.jsonl has no text under prompt, text, caption; expected one of them"),
        ("p.jsonl", '{"prompt": 1, "text": "a"}', "line 1 of .* has no text"),
        ("p.jsonl", "[]", "line 1 of .* has no text"),
    ],
)
def test_mistakes_in_files(written, name, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read_prompts(written(name, text))


def test_no_file(tmp_path):
    with pytest.raises(
        UserError, match=r"absent.txt could not be read: No such file.*; expected a text or .jsonl file, or none"
    ):
        read_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(UserError, match="could not be read: Is a directory"):
        read_prompts(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"a": "x"}\n{"a": "y"}\n{"a": "x"}\n'),
        ("p.json", '[{"a": "x"}, {"a": "y"}]'),
        ("p.CSV", "b,a\n1,x\n2,\n3,y\n"),
    ],
)
def test_a_column_of_a_file(written, name, text):
    assert read_prompts("none", f"{written(name, text)}:a", local_files_only=True) == ["x", "y"]


def test_a_column_of_a_parquet_file(tmp_path):
    datasets.Dataset.from_dict({"a": ["x", None, " y"]}).to_parquet(tmp_path / "p.parquet")
    assert read_prompts("none", f"{tmp_path / 'p.parquet'}:a") == ["x", "y"]


def test_the_training_split_or_the_only_one(tmp_path, written):
    written("test.csv", "a\nx\n")
    assert read_prompts("none", f"{tmp_path}:a") == ["x"]
    written("validation.csv", "a\ny\n")
    with pytest.raises(UserError, match="has the splits validation, test; expected train, or a single split"):
        read_prompts("none", f"{tmp_path}:a")
    written("train.csv", "a\nz\n")
    assert read_prompts("none", f"{tmp_path}:a") == ["z"]


@pytest.mark.parametrize(
    ("name", "text", "column", "sentence"),
    [
        ("p.csv", "a,b\nx,1\n", ":c", "has no column c; expected one of a, b"),
        ("p.csv", "a,b\nx,1\n", ":b", "column b of dataset .*p.csv does not hold text; choose another column"),
        ("p.csv", "a,b\n,1\n", ":a", "p.csv:a has no prompts"),
        ("p.csv", "a\nx\n", "", "prompt_dataset is .*p.csv; expected NAME:COLUMN, such as"),
        ("p.csv", "a\nx\n", ":", "expected NAME:COLUMN"),
        ("p.csv", "", ":a", "p.csv could not be loaded: No columns to parse"),
        ("p.tsv", "a\nx\n", ":a", r"p.tsv has an unknown file type; expected a file that ends in .csv, .json"),
    ],
)
def test_mistakes_with_datasets(written, name, text, column, sentence):
    with pytest.raises(UserError, match=sentence):
        read_prompts("none", written(name, text) + column)


@pytest.mark.parametrize("local_files_only", [True, False])
def test_the_hub_is_left_alone_where_asked(monkeypatch, local_files_only):
    asked = []

    def unreachable(*_, **options):
        asked.append(options["repo_id"])
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match="dataset nobody/nothing could not be loaded: "):
        read_prompts("none", "nobody/nothing:a", local_files_only)
    assert asked == ([] if local_files_only else ["nobody/nothing"])
    assert not datasets.config.HF_HUB_OFFLINE


def test_one_source_at_a_time(written):
    with pytest.raises(UserError, match="leave one of them out"):
        read_prompts(written("p.txt", "a"), "d:c")


def test_datasets_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'selfnpo\[datasets\]'"):
        read_prompts("none", "d:c")


def clip_tokenizer():
    words = ["a", "a</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=6)


def t5_tokenizer():
    words = ["<pad>", "</s>", "<unk>", "▁", "a"]
    return T5Tokenizer(vocab=[(word, -float(number)) for number, word in enumerate(words)], extra_ids=0, model_max_length=6)


@pytest.mark.parametrize(("tokenizer", "special"), [(clip_tokenizer(), 2), (t5_tokenizer(), 2)])  # T5: </s> and the word's ▁
def test_prompts_that_are_cut_are_counted_in_silence(tokenizer, special):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        fits = "a" * (6 - special)
        assert too_long([fits, fits + "a", "a" * 100, ""], tokenizer, 6) == 2
        assert too_long([], tokenizer, 6) == 0
        assert not records
        tokenizer("a" * 100)  # says so by itself, hence the test would notice
        assert records
    finally:
        logger.removeHandler(handler)
