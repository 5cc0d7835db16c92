"""Atomic writing of files and folders, and the header of a safetensors file that is written tensor by tensor.

Permissions follow the umask, even if a library (safetensors' `save_file`) makes a file readable only to its owner.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from selfnpo.errors import UserError

PARTIAL = ".partial"
DTYPES = {  # by their names in safetensors headers
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with committed_file(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def committed_file(path: Path) -> Iterator[Path]:
    """A temporary path with the same suffix. It replaces `path` if the block succeeds, and is deleted otherwise."""
    partial = path.with_name(f"{PARTIAL}-{path.name}")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def committed_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill. It replaces `folder` if the block succeeds, and is deleted otherwise."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            if path.is_file():
                path.chmod(partial.stat().st_mode & 0o666)
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        _flush(folder.parent)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def tensors_header(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The start of a safetensors file; the data of `tensors` follow in their order. A writer can then produce one after the
    other, whereas safetensors' own `save_file` needs all tensors at once."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
