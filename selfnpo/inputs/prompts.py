"""Prompts to train on: from a text file, a JSON lines file, a column of a Hugging Face dataset, or none."""

import json
from pathlib import Path
from typing import Any

from selfnpo.errors import UserError, first_line
from selfnpo.options import NONE

KEYS = ("prompt", "text", "caption")
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}  # for `datasets`


def read_prompts(prompts: str, prompt_dataset: str | None = None, local_files_only: bool = False) -> list[str]:
    """All prompts without duplicates, in order of first appearance.

    Args:
        prompts: a file with one prompt per line, a .jsonl file, or "none" for only the empty prompt.
        prompt_dataset: NAME:COLUMN, where NAME is a dataset's id or a local folder or file that `datasets` can read. The
            split "train" is used, or the only split. Rows without a value are skipped, like blank lines.
        local_files_only: take the dataset from the cache of `datasets` and never contact the hub.

    Raises:
        UserError: there are no prompts, or the source cannot be read.
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
        name = prompt_dataset or prompts
        raise UserError(f"{name} has no prompts; expected one per line, or --prompts none for the empty prompt")
    return [*dict.fromkeys(found)]


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"prompts {path} could not be read: {error.strerror}"
        raise UserError(f"{reason}; expected a text or .jsonl file, or none") from error
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of {path} is not UTF-8 text; convert the file to UTF-8") from error
        if path.suffix == ".jsonl" and text.strip():
            text = _prompt_of(text, f"line {number} of {path}")
        found.append(text)
    return found


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}; expected one object per line") from error
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(value, str):
        raise UserError(f"{where} has no text under {', '.join(KEYS)}; expected one of them, or a plain string")
    return value


def _column(prompt_dataset: str, local_files_only: bool) -> list[str]:
    name, _, column = prompt_dataset.rpartition(":")
    if not name or not column:
        example = "Gustavosta/Stable-Diffusion-Prompts:Prompt"
        raise UserError(f"prompt_dataset is {prompt_dataset}; expected NAME:COLUMN, such as {example}")
    splits = _splits(name, local_files_only)
    if "train" not in splits and len(splits) > 1:
        raise UserError(f"dataset {name} has the splits {', '.join(splits)}; expected train, or a single split")
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    if column not in rows.column_names:
        raise UserError(f"dataset {name} has no column {column}; expected one of {', '.join(rows.column_names)}")
    found = [value for value in rows[column][:] if value is not None]
    if not all(isinstance(value, str) for value in found):
        raise UserError(f"column {column} of dataset {name} does not hold text; choose another column")
    return found


def _splits(name: str, local_files_only: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("prompt_dataset needs the package datasets; run pip install 'selfnpo[datasets]'") from error
    path = Path(name)
    source: dict[str, Any] = {"path": name}
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"dataset {name} has an unknown file type; expected a file that ends in {', '.join(READERS)}")
        source = {"path": READERS[path.suffix.lower()], "data_files": name}
    was_offline = datasets.config.HF_HUB_OFFLINE
    # The only switch that works: `datasets` ignores DownloadConfig.local_files_only.
    datasets.config.HF_HUB_OFFLINE = was_offline or local_files_only
    try:
        return datasets.load_dataset(**source)
    except Exception as error:  # datasets raises many types, also those of its parsers
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise UserError(f"dataset {name} could not be loaded: {first_line(cause or error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
