"""The log of a run: log.jsonl and optionally TensorBoard or Weights & Biases, through accelerate's trackers, as in
diffusers' own scripts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfnpo.config import TrainConfig
from selfnpo.errors import UserError, first_line

PROJECT = "selfnpo"  # project name in Weights & Biases


class RunLog:
    """Stays open until `close`."""

    def __init__(self, config: TrainConfig, output_dir: Path):
        """
        Raises:
            UserError: logging_dir cannot be written, or Weights & Biases cannot be reached.
        """
        self._tracker = _tracker(config, output_dir)
        self._file = (output_dir / "log.jsonl").open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Write the metrics of one step."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tracker:
            self._tracker.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def picture(self, path: Path, step: int) -> None:
        """Log a sample grid, if there is a tracker."""
        if self._tracker:
            with Image.open(path) as image:
                self._tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step, **self._layout)

    @property
    def _layout(self) -> dict[str, str]:
        return {"dataformats": "NHWC"} if self._tracker.name == "tensorboard" else {}

    def close(self) -> None:
        self._file.close()
        if self._tracker:
            self._tracker.finish()
            self._tracker = None


def _tracker(config: TrainConfig, output_dir: Path) -> Any:
    if config.report_to == "none":
        return None
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState(cpu=True)  # trackers need it, although there is only one process
    if config.report_to == "tensorboard":
        tracker = TensorBoardTracker("", output_dir / config.logging_dir)
    else:
        tracker = WandBTracker(PROJECT, name=output_dir.resolve().name, dir=str(output_dir))
    try:
        tracker.start()
    except OSError as error:
        raise UserError(f"logging_dir {config.logging_dir} cannot be written: {error.strerror or error}") from error
    except Exception as error:  # wandb raises its own types
        raise UserError(
            f"report_to is {config.report_to}, but it could not be started ({first_line(error)}); run wandb login, set "
            "WANDB_MODE=offline, or leave --report_to out"
        ) from error
    return tracker
