"""Files that are either whole or absent: atomic writes, and checkpoints that prove they are intact.

A checkpoint is a folder of state.safetensors and state.json (scalars, and the digest of the tensors). It is written under
another name, flushed to disk and committed by rename.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from selfnpo.errors import UserError

_PARTIAL = ".partial"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with committed_file(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def committed_file(path: Path) -> Iterator[Path]:
    """A name of the same suffix to write to; it takes the place of `path` when the block ends well, and vanishes if not."""
    partial = path.with_name(f"{_PARTIAL}-{path.name}")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def committed_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `folder` when the block ends well, and vanishes otherwise."""
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        _flush(folder.parent)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    with committed_folder(folder) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors")
        scalars = scalars | {"sha256": _digest(partial / "state.safetensors")}
        (partial / "state.json").write_text(json.dumps(scalars, indent=1))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and scalars of an intact checkpoint.

    Raises:
        UserError: the folder is no checkpoint, or its tensors are not the ones that were saved.
    """
    try:
        scalars = json.loads((folder / "state.json").read_text())
        if _digest(folder / "state.safetensors") != scalars["sha256"]:
            raise UserError(f"{folder} is damaged: the digest of state.safetensors differs from the recorded one")
        return load_file(folder / "state.safetensors"), scalars
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} is no intact checkpoint: {type(error).__name__}: {error}") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = {int(match[1]): path for path in output_dir.glob("*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [found[step] for step in sorted(found)]


def load_latest(output_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The newest intact checkpoint of a run; damaged ones are named and passed over."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            return load_checkpoint(folder)
        except UserError as error:
            tqdm.write(f"passed over: {error}")
    raise UserError(f"{output_dir} holds no intact checkpoint; start without --resume_from_checkpoint")


def prune_checkpoints(output_dir: Path, limit: int) -> None:
    for folder in list_checkpoints(output_dir)[:-limit]:
        shutil.rmtree(folder)
