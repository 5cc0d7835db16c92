"""The folder of a run: what is in it, and when it may be written."""

import re
import shutil
import tempfile
from pathlib import Path

from selfnpo.errors import UserError

# What a training run writes beside its checkpoints.
RESULTS = (
    "negative",
    "config.yaml",
    "metrics.json",
    "log.jsonl",
    "comparison.png",
    "report.md",
    "samples",
    "tensorboard",
    "wandb",
)


def check_output(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise a UserError if the folder holds something and neither overwrite nor resume was asked for."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite or resume):
        raise UserError(
            f"output_dir {folder} exists and is not empty; choose another, pass --overwrite to replace its results"
            + (", or --resume_from_checkpoint latest to continue" if list_checkpoints(folder) else "")
        )


def prepare_output(folder: Path, results: tuple[str, ...], overwrite: bool, resume: bool = False) -> None:
    """Make `folder` ready to be written.

    Args:
        results: names that the run will write; these alone, and checkpoints, are removed by `overwrite`.

    Raises:
        UserError: the folder holds something and neither overwrite nor resume was asked for, or it cannot be written.
    """
    try:
        check_output(folder, overwrite, resume)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if overwrite and not resume:
            for path in [folder / name for name in results] + list_checkpoints(folder):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror or error}; choose another") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = {int(match[1]): path for path in output_dir.glob("*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [found[step] for step in sorted(found)]
