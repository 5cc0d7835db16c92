"""Which images a folder has, and their captions. Only rollouts that start from data read images."""

import json
from pathlib import Path

from selfnpo.errors import UserError
from selfnpo.inputs.prompts import KEYS

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """All images of a folder and its subfolders, sorted, with one caption each.

    Captions come from the folder's metadata.jsonl (Hugging Face's format), else from a .txt file with the image's name (as
    for kohya), else they are "".

    Raises:
        UserError: the folder does not exist or has no images, or its metadata.jsonl is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"train_data_dir {folder} is not a folder; expected a folder of images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"train_data_dir {folder} has no images; expected files that end in {', '.join(SUFFIXES)}")
    listed = _metadata(folder / "metadata.jsonl")
    return files, [_caption(path, listed.get(path.relative_to(folder).as_posix())) for path in files]


def _metadata(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    if path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found[row["file_name"]] = next(row[key] for key in KEYS if isinstance(row.get(key), str))
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
                raise UserError(f'line {number} of {path} is damaged; expected {{"file_name": ..., "text": ...}}') from error
    return found


def _caption(path: Path, listed: str | None) -> str:
    if listed is not None:
        return listed.strip()
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"caption {path.with_suffix('.txt')} could not be read; expected UTF-8 text") from error
