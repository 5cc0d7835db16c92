"""Settings that several commands share. Nothing heavy is imported here: `--help` and mistakes are answered at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from selfnpo.errors import UserError

DEMO = "demo"  # in the place of a model: the class-conditional DiT on 8x8 digits that is shipped with the package
NONE = "none"  # in the place of a file of prompts
Precision = Literal["auto", "no", "fp16", "bf16"]
Split = Literal["final", "development"]  # of the digits, see selfnpo/inputs/digits.py


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    pretrained_model_name_or_path: Annotated[str, arg(aliases=("--model", "--pretrained_teacher_model"))] = DEMO
    """The base: demo, a diffusers folder, a Hugging Face id, or a single .safetensors file."""
    revision: Annotated[str | None, arg(aliases=("--teacher_revision",))] = None
    """Branch, tag or commit of a Hugging Face id."""
    variant: str | None = None
    """Weights with this word in their file names, such as fp16."""
    local_files_only: bool = False
    """Use what is on disk and in the cache; never ask the hub."""
    single_file_config: str | None = None
    """For a single file: a diffusers folder or id with its configuration; by default the one that diffusers recognises."""
    denoiser_name_or_path: str | None = None
    """UNet or transformer in place of the base's own: a folder, an id or a file, as of Diffusion-DPO and SePPO."""
    lora_name_or_path: Annotated[str | None, arg(aliases=("--base_weights",))] = None
    """LoRA to merge into the base: a folder, an id or a file."""
    lora_scale: Annotated[float, arg(aliases=("--base_weights_multiplier",))] = 1.0
    """Strength of that LoRA."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts, where the base's scheduler says it wrongly."""


@dataclass(frozen=True)
class SampleOptions:
    """The size of what is sampled, and SDXL's micro-conditioning; None is what the model was trained for."""

    resolution: int | None = None
    """Height and width in pixels; by default what the model was trained for."""
    height: int | None = None
    """Height in pixels, if it is not the resolution."""
    width: int | None = None
    """Width in pixels, if it is not the resolution."""
    num_frames: int | None = None
    """Frames of a video."""
    original_size: tuple[int, int] | None = None
    """SDXL: height and width that the model is told its training image had; by default those sampled."""
    crops_coords_top_left: tuple[int, int] = (0, 0)
    """SDXL: where the model is told its training image was cropped."""
    target_size: tuple[int, int] | None = None
    """SDXL: height and width that the model is told to aim for; by default those sampled."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels, with those of the model's training as defaults."""
        return self.height or self.resolution or height, self.width or self.resolution or width


@dataclass(frozen=True)
class MixOptions:
    """Which models are mixed."""

    negative: Path = Path("runs/demo/negative")
    """Folder, Hugging Face id or file of a trained negative model, full weights or LoRA: theta + delta."""
    positive: Path | None = None
    """Folder, id or file of a fine-tuned positive model, full weights or LoRA: theta + eta. By default the base itself."""
    alpha: float = 1.0
    """Share of eta in the negative: theta + alpha eta + beta delta."""
    force: bool = False
    """Allow alpha and beta outside [0, 1]."""

    def check_shares(self, betas: Sequence[float]) -> None:
        """Raise a UserError if alpha or a beta makes no sense."""
        for name, value in (("alpha", self.alpha), *(("beta", beta) for beta in betas)):
            if not (math.isfinite(value) if self.force else 0 <= value <= 1):
                hint = "a finite number" if self.force else "a value from 0 to 1, or any with --force"
                raise UserError(f"{name} is {value}; expected {hint}")
        if self.alpha != 1 and self.positive is None:
            raise UserError(
                f"alpha is {self.alpha}, but it scales eta and no positive is given; pass --positive or leave --alpha out"
            )
