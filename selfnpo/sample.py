"""python -m selfnpo.sample: plain guidance beside guidance away from a negative model, at equal noise."""

from dataclasses import dataclass
from pathlib import Path

import torch

from selfnpo.cli import parse, run
from selfnpo.config import Precision, dtype_of
from selfnpo.decode import decode_samples
from selfnpo.errors import UserError
from selfnpo.merge import mix
from selfnpo.models import ModelOptions, SampleOptions, Source, load_negative, load_pretrained
from selfnpo.picture import save_comparison
from selfnpo.sampling import ddim_sample, start_noise
from selfnpo.schedule import make_grid


@dataclass(frozen=True)
class SampleConfig(SampleOptions, ModelOptions):
    """Sample with and without a negative model."""

    negative: Path = Path("runs/demo/negative")
    """Folder or Hugging Face id of a trained negative model, full weights or LoRA: theta + delta."""
    prompt: tuple[str, ...] = ()
    """What to sample, cycled over the images: prompts, or class numbers; by default every class, or the empty prompt."""
    positive: Path | None = None
    """Folder or id of a fine-tuned positive model of the same architecture: theta + eta. By default the base itself."""
    alpha: float = 1.0
    """Share of eta in the negative: theta + alpha eta + beta delta."""
    beta: float = 1.0
    """Share of delta in the negative."""
    guidance_scale: float = 3.0
    """w + 1 in eps = (w + 1) eps_pos - w eps_neg."""
    num_images: int = 80
    """Images per panel."""
    batch_size: int = 80
    """Images per forward pass."""
    mixed_precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 on GPUs that have it and no (float32) elsewhere."""
    num_inference_steps: int = 25
    """DDIM steps."""
    seed: int = 0
    """Key of the noise."""
    output: Path = Path("samples.png")
    """PNG file to write."""
    overwrite: bool = False
    """Replace the file if it exists."""


def check(config: SampleConfig) -> None:
    for name, low, high in (
        ("alpha", 0, 1),
        ("beta", 0, 1),
        ("num_images", 1, 10_000),
        ("batch_size", 1, 10_000),
        ("seed", 0, 2**63 - 1),
    ):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"{name} is {getattr(config, name)}; expected a value from {low} to {high}")
    if not 1 < config.guidance_scale <= 100:
        raise UserError(f"guidance_scale is {config.guidance_scale}; expected a value above 1, where the negative has a say")
    if config.output.suffix != ".png":
        raise UserError(f"output is {config.output}; expected a file name that ends in .png")
    if config.output.exists() and not config.overwrite:
        raise UserError(f"output {config.output} exists; choose another name or pass --overwrite")
    if not config.output.parent.is_dir():
        raise UserError(f"output {config.output} lies in a folder that does not exist; create {config.output.parent} first")


def main(config: SampleConfig) -> None:
    check(config)
    make_grid(Source(config).scheduler, config.num_inference_steps)  # refused before anything lasts
    base = load_pretrained(config, config, further_prompts=config.prompt, dtype=dtype_of(config.mixed_precision))
    trained = load_negative(config.negative, base)
    positive = load_negative(config.positive, base) if config.positive else None
    negative = mix(base.denoiser, trained, positive, config.alpha, config.beta)
    asked = base.asked(len(config.prompt))
    condition = asked[torch.arange(config.num_images) % len(asked)]
    noise = start_noise(base, config.num_images, config.seed)
    steps, batch_size = config.num_inference_steps, config.batch_size
    samples = [
        ddim_sample(base, noise, condition, config.guidance_scale, model, positive, steps, batch_size)
        for model in (positive, negative)
    ]
    plain, guided = decode_samples(base, torch.cat(samples)).chunk(2)
    w = config.guidance_scale - 1
    panels = [
        (f"plain guidance (CFG), w = {w:g}", plain),
        (f"negative model, w = {w:g}, beta = {config.beta:g}", guided),
    ]
    is_video = len(plain) > config.num_images  # a row of frames each
    columns = 4 if is_video or len(asked) == 1 else min(len(asked), 10)
    caption = f"{config.negative}; equal positions start from equal noise"
    save_comparison(config.output, panels, min(columns, len(plain)), caption)
    print(f"written to {config.output}")


if __name__ == "__main__":
    run(lambda: main(parse(SampleConfig)))
