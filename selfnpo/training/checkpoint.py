"""Checkpoints that prove they are intact.

A checkpoint is a folder with state.safetensors and state.json (scalars, and the digest of the tensors). It is written under
another name, tensor by tensor, flushed to disk and committed by rename. selfnpo/training/snapshot.py does this in the
background while training continues.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from selfnpo.errors import UserError
from selfnpo.files import PARTIAL, committed_folder, tensors_header
from selfnpo.output import list_checkpoints

_FLUSH = 1 << 28  # bytes between flushes: otherwise a machine with much memory writes nothing to disk until the end


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], go_on: Callable[[], object] = lambda: None) -> str:
    """Write a safetensors file and return its digest.

    Only two tensors are on the host at a time (safetensors' own `save_file` needs all of them there): one is hashed and
    written while the next one is fetched.

    Args:
        tensors: on any device, in any layout.
        go_on: called before every tensor; an exception from it stops the writing.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # each at a multiple of its itemsize
    text = tensors_header(dict(ordered))
    digest = hashlib.sha256(text)
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
        jobs = [writer.submit(file.write, text)]
        fetched = flushed = 0
        for _, tensor in ordered:
            go_on()
            data = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
            for job in jobs:
                job.result()
            jobs = [hasher.submit(digest.update, data), writer.submit(file.write, data)]
            fetched += data.nbytes
            if fetched - flushed >= _FLUSH:
                os.fsync(file.fileno())
                flushed = fetched
        for job in jobs:
            job.result()
    return digest.hexdigest()


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    scalars: Callable[[], dict[str, Any]],
    go_on: Callable[[], object] = lambda: None,
) -> None:
    """Write a checkpoint.

    Args:
        scalars: called after the tensors are written.
        go_on: called before every tensor; an exception from it stops the writing.

    Raises:
        UserError: the checkpoint cannot be written.
    """
    with committed_folder(folder) as partial:
        digest = write_tensors(partial / "state.safetensors", tensors, go_on)
        (partial / "state.json").write_text(json.dumps(scalars() | {"sha256": digest}, indent=1))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and scalars of a checkpoint, after checking that it is intact.

    Raises:
        UserError: the folder is not a checkpoint, or its tensors are not the ones that were saved.
    """
    try:
        scalars = json.loads((folder / "state.json").read_text())
        if _digest(folder / "state.safetensors") != scalars["sha256"]:
            raise UserError(f"{folder} is damaged: the digest of state.safetensors differs from the recorded one")
        return load_file(folder / "state.safetensors"), scalars
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} is not an intact checkpoint: {type(error).__name__}: {error}") from error


def load_latest(output_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The newest intact checkpoint of a run. Damaged ones are reported and skipped."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            return load_checkpoint(folder)
        except UserError as error:
            tqdm.write(f"skipped: {error}")
    raise UserError(f"{output_dir} has no intact checkpoint; start without --resume_from_checkpoint")


def remove_partial(output_dir: Path) -> None:
    """Delete half-written checkpoints of a killed run. The resumed run may save at other steps and never replace them."""
    for folder in output_dir.glob(f".checkpoint-*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def prune_checkpoints(output_dir: Path, limit: int) -> None:
    """Delete the oldest checkpoints. If one cannot be deleted, print a note and keep it."""
    for folder in list_checkpoints(output_dir)[:-limit]:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            tqdm.write(f"note: the old checkpoint {folder} could not be deleted: {error.strerror or error}")
