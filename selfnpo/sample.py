"""python -m selfnpo.sample: plain guidance beside guidance away from a negative model, at equal noise."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo.cli import parse, run
from selfnpo.config import Precision, dtype_of, preset_config
from selfnpo.decode import decode_samples
from selfnpo.errors import UserError
from selfnpo.merge import mix_
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
    guidance_scale: float | None = None
    """w + 1 in eps = (w + 1) eps_pos - w eps_neg; by default the family's usual one."""
    num_images: int | None = None
    """Images per panel; by default 80 of the demo, 4 of other models."""
    batch_size: int | None = None
    """Images per forward pass; by default as many as a training step of the family has."""
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
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; expected a value from {low} to {high}")
    scale = config.guidance_scale
    if scale is not None and not 1 < scale <= 100:
        raise UserError(f"guidance_scale is {scale}; expected a value above 1, where the negative has a say")
    if config.output.suffix != ".png":
        raise UserError(f"output is {config.output}; expected a file name that ends in .png")
    if config.output.exists() and not config.overwrite:
        raise UserError(f"output {config.output} exists; choose another name or pass --overwrite")
    if not config.output.parent.is_dir():
        raise UserError(f"output {config.output} lies in a folder that does not exist; create {config.output.parent} first")


def main(config: SampleConfig) -> None:
    check(config)
    source, steps = Source(config), config.num_inference_steps
    make_grid(source.scheduler, steps)  # refused before anything lasts
    scale = config.guidance_scale or source.family.guidance_scale
    num_images = config.num_images or (80 if source.is_demo else 4)
    batch_size = config.batch_size or preset_config("default", source.family.presets).train_batch_size
    # In float32 on the host until they are mixed: no more than what samples lies on a GPU.
    dtype, host = dtype_of(config.mixed_precision), torch.device("cpu")
    base = load_pretrained(config, config, further_prompts=config.prompt, dtype=dtype, weights_device=host)
    negative = load_negative(config.negative, base)
    tuned = load_negative(config.positive, base) if config.positive else None
    mix_(negative, base.denoiser, tuned, config.alpha, config.beta)
    positive = tuned or base.denoiser
    for model in (negative, positive):
        nn.Module.to(model, base.device, dtype)
    asked = base.asked(len(config.prompt))
    condition = asked[torch.arange(num_images) % len(asked)]
    noise = start_noise(base, num_images, config.seed)
    samples = [
        ddim_sample(base, noise, condition, scale, model, positive, steps, batch_size) for model in (positive, negative)
    ]
    plain, guided = decode_samples(base, torch.cat(samples)).chunk(2)
    w = scale - 1
    panels = [
        (f"plain guidance (CFG), w = {w:g}", plain),
        (f"negative model, w = {w:g}, beta = {config.beta:g}", guided),
    ]
    is_video = len(plain) > num_images  # a row of frames each
    columns = 4 if is_video or len(asked) == 1 else min(len(asked), 10)
    caption = f"{config.negative}; equal positions start from equal noise"
    save_comparison(config.output, panels, min(columns, len(plain)), caption)
    print(f"written to {config.output}")


if __name__ == "__main__":
    run(lambda: main(parse(SampleConfig)))
