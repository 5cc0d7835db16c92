"""python -m selfnpo.sample: plain guidance beside guidance away from a negative model, at equal noise."""

from dataclasses import dataclass
from pathlib import Path

import torch

from selfnpo.cli import parse, run
from selfnpo.errors import UserError
from selfnpo.merge import mix
from selfnpo.models import DEMO, load_negative, load_pretrained
from selfnpo.picture import save_comparison
from selfnpo.sampling import ddim_sample, start_noise


@dataclass(frozen=True)
class SampleConfig:
    """Sample with and without a negative model."""

    negative: Path = Path("runs/demo/negative")
    """Folder of a trained negative model: theta + delta."""
    positive: Path | None = None
    """Folder of a fine-tuned positive model of the same architecture: theta + eta. By default the base itself."""
    alpha: float = 1.0
    """Share of eta in the negative: theta + alpha eta + beta delta."""
    beta: float = 1.0
    """Share of delta in the negative."""
    guidance_scale: float = 3.0
    """w + 1 in eps = (w + 1) eps_pos - w eps_neg."""
    num_images: int = 80
    """Images per panel; labels are cycled."""
    num_inference_steps: int = 25
    """DDIM steps."""
    seed: int = 0
    """Key of the noise."""
    pretrained_model_name_or_path: str = DEMO
    """The base model: theta."""
    output: Path = Path("samples.png")
    """PNG file to write."""
    overwrite: bool = False
    """Replace the file if it exists."""


def check(config: SampleConfig) -> None:
    for name, low, high in (
        ("alpha", 0, 1),
        ("beta", 0, 1),
        ("num_images", 1, 10_000),
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
    base = load_pretrained(config.pretrained_model_name_or_path)
    trained = load_negative(config.negative, base)
    positive = load_negative(config.positive, base) if config.positive else None
    negative = mix(base.denoiser, trained, positive, config.alpha, config.beta)
    condition = torch.arange(config.num_images) % base.num_conditions
    noise = start_noise(base, config.num_images, config.seed)
    plain, guided = (
        ddim_sample(base, noise, condition, config.guidance_scale, model, positive, config.num_inference_steps)
        for model in (positive, negative)
    )
    w = config.guidance_scale - 1
    panels = [
        (f"plain guidance (CFG), w = {w:g}", plain),
        (f"negative model, w = {w:g}, beta = {config.beta:g}", guided),
    ]
    save_comparison(config.output, panels, base.num_conditions, f"{config.negative}; equal positions start from equal noise")
    print(f"written to {config.output}")


if __name__ == "__main__":
    run(lambda: main(parse(SampleConfig)))
