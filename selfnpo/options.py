"""Settings that several commands share. Nothing heavy is imported here, so that `--help` and mistakes are answered fast."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from selfnpo.errors import UserError

DEMO = "demo"  # instead of a model: the class-conditional DiT on 8x8 digits that comes with the package
NONE = "none"  # instead of a prompt file
LARGEST = 1_000_000  # magnitude of a share in a mixture
Precision = Literal["auto", "no", "fp16", "bf16"]
Split = Literal["final", "development"]  # of the digits; see selfnpo/inputs/digits.py


def changed(settings: Any, *kinds: type) -> dict[str, Any]:
    """The values of `settings` that differ from their defaults, for the fields of these dataclasses (by default its own)."""
    found = [field for kind in kinds or (type(settings),) for field in fields(kind)]
    return {each.name: getattr(settings, each.name) for each in found if getattr(settings, each.name) != each.default}


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    pretrained_model_name_or_path: Annotated[str, arg(aliases=("--model", "--pretrained_teacher_model"))] = DEMO
    """The base model: demo, a diffusers folder, a Hugging Face id, or a single .safetensors file."""
    revision: Annotated[str | None, arg(aliases=("--teacher_revision",))] = None
    """Branch, tag or commit on the Hugging Face hub."""
    variant: str | None = None
    """Variant of the weights, such as fp16: the word in their file names."""
    local_files_only: bool = False
    """Use only local and cached files; never contact the hub."""
    single_file_config: str | None = None
    """For a single file: a diffusers folder or id with its configuration; by default diffusers recognises it."""
    denoiser_name_or_path: str | None = None
    """Folder, id or file of a UNet or transformer to use instead of the base's own, such as Diffusion-DPO's or SePPO's."""
    lora_name_or_path: Annotated[str | None, arg(aliases=("--base_weights",))] = None
    """Folder, id or file of a LoRA to merge into the base."""
    lora_scale: Annotated[float, arg(aliases=("--base_weights_multiplier",))] = 1.0
    """Strength of that LoRA."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts, if the base's scheduler configuration is wrong."""

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The models that the base is made of."""
        return self.pretrained_model_name_or_path, self.denoiser_name_or_path, self.lora_name_or_path


@dataclass(frozen=True)
class SampleOptions:
    """Sample size and SDXL's micro-conditioning. None: what the model was trained for."""

    resolution: int | None = None
    """Height and width in pixels; by default the model's training resolution."""
    height: int | None = None
    """Height in pixels, if it differs from resolution."""
    width: int | None = None
    """Width in pixels, if it differs from resolution."""
    num_frames: int | None = None
    """Number of frames in a video."""
    original_size: tuple[int, int] | None = None
    """SDXL: original image height and width to condition on; by default the sampled size."""
    crops_coords_top_left: tuple[int, int] = (0, 0)
    """SDXL: crop position (top, left) to condition on."""
    target_size: tuple[int, int] | None = None
    """SDXL: target height and width to condition on; by default the sampled size."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels; the arguments, the size that the model was trained for, are the defaults."""
        return self.height or self.resolution or height, self.width or self.resolution or width


@dataclass(frozen=True)
class MixOptions:
    """Which models to mix."""

    negative: Path = Path("runs/demo/negative")
    """Folder, Hugging Face id or file of a trained negative (full weights or LoRA): theta + delta."""
    positive: Path | None = None
    """Folder, id or file of a fine-tuned positive model (full weights or LoRA): theta + eta. By default the base itself."""
    alpha: float = 1.0
    """Weight of eta in the negative: theta + alpha eta + beta delta."""
    force: bool = False
    """Allow alpha and beta outside [0, 1]."""

    def name_default(self, model: str) -> None:
        """Say which negative is used where none was given for a model other than the demo."""
        if self.negative == MixOptions.negative and model != DEMO:
            print(f"no negative was given with --negative, so this takes {self.negative}")

    def check_shares(self, betas: Sequence[float]) -> None:
        """Raise a UserError if alpha or a beta makes no sense."""
        for name, value in (("alpha", self.alpha), *(("beta", beta) for beta in betas)):
            if not (abs(value) < LARGEST if self.force else 0 <= value <= 1):
                hint = f"a finite number below {LARGEST:,}" if self.force else "a value from 0 to 1, or any with --force"
                raise UserError(f"{name} is {value}; expected {hint}")
        if self.alpha != 1 and self.positive is None:
            raise UserError(
                f"alpha is {self.alpha}, but it only applies to a positive model; pass --positive or leave --alpha out"
            )
