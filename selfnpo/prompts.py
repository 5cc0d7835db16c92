"""Prompts to train on: from a text file, a JSON lines file, a column of a Hugging Face dataset, or none."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfnpo.errors import UserError

NONE = "none"
KEYS = ("prompt", "text", "caption")


def read_prompts(prompts: str, prompt_dataset: str | None = None, local_files_only: bool = False) -> list[str]:
    """Every prompt once, in order of first appearance.

    Args:
        prompts: a file with one prompt a line, a .jsonl file, or "none" for the empty prompt alone.
        prompt_dataset: NAME:COLUMN, where NAME is a dataset's id or a local folder or file that `datasets` reads.

    Raises:
        UserError: there is no prompt, or the source cannot be read.
    """
    if prompt_dataset is not None:
        if prompts != NONE:
            raise UserError("prompts and prompt_dataset are both given; leave one of them out")
        found = _column(prompt_dataset, local_files_only)
    elif prompts == NONE:
        return [""]
    else:
        found = _lines(Path(prompts))
    found = [text for text in (text.strip() for text in found) if text]
    if not found:
        raise UserError(f"{prompt_dataset or prompts} holds no prompt; expected one a line, or --prompts none for the empty prompt")
    return [*dict.fromkeys(found)]


def too_long(prompts: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """How many prompts have more than `max_length` tokens, special ones included."""
    return sum(len(ids) > max_length for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids)


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts {path} could not be read: {error.strerror}; expected a text or .jsonl file, or none") from error
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of {path} is no UTF-8 text; convert the file to UTF-8") from error
        if path.suffix == ".jsonl" and text.strip():
            text = _prompt_of(text, f"line {number} of {path}")
        found.append(text)
    return found


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(value, str):
        raise UserError(f"{where} holds no text under {', '.join(KEYS)}")
    return value


def _column(prompt_dataset: str, local_files_only: bool) -> list[str]:
    name, _, column = prompt_dataset.rpartition(":")
    if not name or not column:
        raise UserError(f"prompt_dataset is {prompt_dataset}; expected NAME:COLUMN, such as Gustavosta/Stable-Diffusion-Prompts:Prompt")
    try:
        import datasets
    except ImportError as error:
        raise UserError("prompt_dataset needs the package datasets; run pip install 'selfnpo[datasets]'") from error
    path = Path(name)
    source: dict[str, Any] = {"path": name}
    if path.is_file():
        source = {"path": {".jsonl": "json", ".txt": "text"}.get(path.suffix, path.suffix[1:]), "data_files": name}
    try:
        loaded = datasets.load_dataset(
            **source, download_config=datasets.DownloadConfig(local_files_only=local_files_only)
        )
    except Exception as error:  # datasets raises many kinds, also from the parsers beneath it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"dataset {name} could not be loaded: {reason}") from error
    rows = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if column not in rows.column_names:
        raise UserError(f"dataset {name} has no column {column}; expected one of {', '.join(rows.column_names)}")
    found = rows[column][:]
    if not all(isinstance(text, str) for text in found):
        raise UserError(f"column {column} of dataset {name} holds other things than text; choose another column")
    return found
