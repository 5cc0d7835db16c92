"""The settings of `python -m selfnpo.sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from selfnpo.errors import UserError
from selfnpo.options import NONE, MixOptions, ModelOptions, Precision, SampleOptions

RECORD = "samples.json"  # marks a folder that contains single samples
VIDEOS = (".gif", ".mp4")
FPS, FPS_OF_GIF = 8, 50  # of a video by default; the most that viewers of GIFs show
ON_A_SHEET = 1000  # maximum number of images per method on a contact sheet


@dataclass(frozen=True)
class SampleConfig(MixOptions, SampleOptions, ModelOptions):
    """Sample with and without a negative model. Writes a contact sheet, or one file per image with --output_dir. Several
    guidance scales or betas make a sweep."""

    prompt: tuple[str, ...] = ()
    """Prompts (or class numbers), used in turn. By default every class, or the empty prompt."""
    prompts: str = NONE
    """File with one prompt (or class number) per line, or .jsonl as for training; use instead of --prompt."""
    beta: Annotated[tuple[float, ...], arg(aliases=("--betas",))] = (1.0,)
    """Strength of the negative: the weight of delta. Several values make a sweep."""
    guidance_scale: Annotated[tuple[float, ...], arg(aliases=("--guidance_scales",))] = ()
    """Guidance scale as in diffusers, where 1 means no guidance; by default the model family's usual value. Several values
    make a sweep."""
    num_images: int | None = None
    """Number of images or videos per method. By default one per prompt. A contact sheet has at least 4 images (80 for the
    demo, 10 in its sweeps) or 1 video."""
    batch_size: int | None = None
    """Images per forward pass; by default the model family's training batch size."""
    mixed_precision: Precision = "auto"
    """Precision of the networks. auto: bf16 on GPUs that support it, no (float32) elsewhere."""
    num_inference_steps: int = 25
    """DDIM steps."""
    seed: int = 0
    """Seed of the noise. Image number i always starts from the noise of (seed, i)."""
    fps: int | None = None
    """Frames per second of a video; 8 by default."""
    output: Path | None = None
    """Contact sheet to write: .png, or .gif or .mp4 for videos. By default samples.png (samples.gif for videos); if that
    exists, samples-2.png and so on."""
    output_dir: Path | None = None
    """Write one file per image into this folder instead: cfg/0000.png, negative/0000.png and so on."""
    video_format: Literal["gif", "mp4"] | None = None
    """Format of the videos in output_dir; by default gif."""
    overwrite: bool = False
    """Replace an existing output file, or the samples in output_dir."""

    @property
    def is_sweep(self) -> bool:
        return len(self.guidance_scale) > 1 or len(self.beta) > 1


def check(config: SampleConfig) -> None:
    most = ON_A_SHEET if config.output_dir is None else 1_000_000
    for name, low, high in (
        ("num_images", 1, most),
        ("batch_size", 1, 10_000),
        ("seed", 0, 2**63 - 1),
        ("num_inference_steps", 1, 1000),
        ("fps", 1, 60),
    ):
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            more = "; pass --output_dir for more" if (name, high) == ("num_images", ON_A_SHEET) and value > high else ""
            raise UserError(f"{name} is {value}; expected a value from {low} to {high}{more}")
    for scale in config.guidance_scale:
        if not 1 < scale <= 100:
            raise UserError(
                f"guidance_scale is {scale}; expected a value above 1 and up to 100, because at 1 there is no guidance and "
                "the negative would have no effect"
            )
    for name, values in (("beta", config.beta), ("guidance_scale", config.guidance_scale)):
        if len(set(values)) < len(values):
            raise UserError(f"{name} is {' '.join(map(str, values))}; expected different values")
    if not config.beta:
        raise UserError("beta is empty; expected one or more values, such as 0.5 1")
    config.check_shares(config.beta)
    for one, other in (("prompt", "prompts"), ("output", "output_dir")):
        if all(getattr(config, name) not in (None, (), NONE) for name in (one, other)):
            raise UserError(f"{one} and {other} are both given; leave one of the two out")
