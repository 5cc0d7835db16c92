"""The folder of a run: its contents, and when it may be written."""

import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from selfnpo.errors import UserError
from selfnpo.options import DEMO

# What a training run writes, apart from its checkpoints.
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


def check_output(folder: Path, overwrite: bool, resume: str | None = "") -> None:
    """Check that a run may write to `folder`, without changing anything.

    Args:
        resume: latest, or a checkpoint, if the run continues an earlier one; "" for commands that cannot.

    Raises:
        UserError: the folder is not empty and neither overwrite nor resume was asked for, there is nothing to resume, or
            the folder cannot be written.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir is {folder}, but {existing} is a file; expected a folder")
    if resume == "latest" and not list_checkpoints(folder):
        raise UserError(
            f"output_dir {folder} has no intact checkpoint to resume from; choose another folder, or leave "
            "--resume_from_checkpoint out"
        )
    if resume and resume != "latest" and not Path(resume).is_dir():
        raise UserError(
            f"resume_from_checkpoint is {resume}, which is not a folder; expected latest, or a checkpoint such as "
            f"{folder / 'checkpoint-1000'}"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite or resume):
        goes_on = resume is None and list_checkpoints(folder)
        raise UserError(
            f"output_dir {folder} exists and is not empty; choose another or pass --overwrite to replace its results"
            + (", or --resume_from_checkpoint latest to continue" if goes_on else "")
        )
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_kept(folder: Path, sources: Iterable[str | Path | None]) -> None:
    """Raise a UserError if writing a model to `folder` would replace one of the models that the command reads."""
    for name in sources:
        if name in (None, DEMO) or not folder.is_dir():
            continue
        path = Path(name)
        places = (path.parent,) if path.is_file() else (path, path / "unet", path / "transformer")
        if any(place.is_dir() and place.samefile(folder) for place in places):
            raise UserError(f"{folder} would be replaced, but this command reads {name}; choose another output_dir")


def prepare_output(folder: Path, results: tuple[str, ...], overwrite: bool, resume: str | None = "") -> None:
    """Create `folder`, or remove earlier results from it.

    Args:
        results: names that the run will write. `overwrite` removes these and checkpoints, and nothing else.

    Raises:
        UserError: as `check_output`.
    """
    check_output(folder, overwrite, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite and not resume:
            for path in [folder / name for name in results] + list_checkpoints(folder):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"output_dir {folder} cannot be written: {error.strerror or error}; choose another")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = {int(match[1]): path for path in output_dir.glob("*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return [found[step] for step in sorted(found)]
