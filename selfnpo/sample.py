"""python -m selfnpo.sample: plain guidance beside guidance away from a negative model, at equal noise."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import arg

from selfnpo.cli import parse, run
from selfnpo.config import Precision, dtype_of, preset_config
from selfnpo.errors import UserError
from selfnpo.mixing import MixOptions
from selfnpo.models import ModelOptions, SampleOptions, Source, load_negative, load_pretrained
from selfnpo.sampling.ddim import plain_guidance, start_noise
from selfnpo.sampling.decode import decode_frames, decode_samples
from selfnpo.sampling.picture import save_comparison, save_table
from selfnpo.sampling.sweep import sweep
from selfnpo.sampling.video import SUFFIXES, check_video, save_video, to_bytes
from selfnpo.schedule import make_grid


@dataclass(frozen=True)
class SampleConfig(MixOptions, SampleOptions, ModelOptions):
    """Sample with and without a negative model; several guidance scales or betas make a sweep."""

    prompt: tuple[str, ...] = ()
    """What to sample, cycled over the images: prompts, or class numbers; by default every class, or the empty prompt."""
    beta: Annotated[tuple[float, ...], arg(aliases=("--betas",))] = (1.0,)
    """Share of delta in the negative; several make a sweep."""
    guidance_scale: Annotated[tuple[float, ...], arg(aliases=("--guidance_scales",))] = ()
    """w + 1 in eps = (w + 1) eps_pos - w eps_neg; by default the family's usual one. Several make a sweep."""
    num_images: int | None = None
    """Images, or videos, per method; by default 80 of the demo (10 in a sweep), 1 video, 4 of other models."""
    batch_size: int | None = None
    """Images per forward pass; by default as many as a training step of the family has."""
    mixed_precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 on GPUs that have it and no (float32) elsewhere."""
    num_inference_steps: int = 25
    """DDIM steps."""
    seed: int = 0
    """Key of the noise."""
    fps: int = 8
    """Frames per second of a video."""
    output: Path | None = None
    """File to write: .png, of videos also .gif or .mp4; by default samples.png, or samples.gif of videos."""
    overwrite: bool = False
    """Replace the file if it exists."""

    @property
    def is_sweep(self) -> bool:
        return len(self.guidance_scale) > 1 or len(self.beta) > 1


def check(config: SampleConfig) -> None:
    for name, low, high in (
        ("num_images", 1, 10_000),
        ("batch_size", 1, 10_000),
        ("seed", 0, 2**63 - 1),
        ("fps", 1, 60),
    ):
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; expected a value from {low} to {high}")
    for scale in config.guidance_scale:
        if not 1 < scale <= 100:
            raise UserError(
                f"guidance_scale is {scale}; expected a value above 1 and up to 100, since w is guidance_scale - 1 and "
                "without a w above 0 the negative would do nothing"
            )
    for name, values in (("beta", config.beta), ("guidance_scale", config.guidance_scale)):
        if len(set(values)) < len(values):
            raise UserError(f"{name} is {' '.join(map(str, values))}; expected different values")
    if not config.beta:
        raise UserError("beta is empty; expected one or more values, such as 0.5 1")
    config.check_shares(config.beta)


def output_file(config: SampleConfig, is_video: bool) -> Path:
    """The file to write, whose suffix says what.

    Raises:
        UserError: it cannot be written, or cannot hold what is asked for.
    """
    movable = is_video and not config.is_sweep
    output = config.output or Path("samples.gif" if movable else "samples.png")
    if output.suffix not in (".png", *(SUFFIXES if movable else ())):
        why = "a sweep is a picture" if is_video else "the model makes images"
        expected = ".png, .gif or .mp4" if movable else f".png, for {why}"
        raise UserError(f"output is {output}; expected a file name that ends in {expected}")
    check_video(output)
    if not output.parent.is_dir():
        raise UserError(f"output {output} lies in a folder that does not exist; create {output.parent} first")
    if output.is_dir() or (output.exists() and not config.overwrite):
        raise UserError(f"output {output} exists; choose another name or pass --overwrite")
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}; choose another folder") from error
    return output


def main(config: SampleConfig) -> None:
    check(config)
    source = Source(config)
    make_grid(source.scheduler, config.num_inference_steps)  # refused before anything lasts
    is_video = len(source.family.sample_shape(source.config, source.scale, config)) == 4
    output = output_file(config, is_video)
    dtype, host = dtype_of(config.mixed_precision), torch.device("cpu")  # where the models are mixed
    base = load_pretrained(config, config, further_prompts=config.prompt, dtype=dtype, weights_device=host)
    negative = load_negative(config.negative, base)
    tuned = load_negative(config.positive, base) if config.positive else None

    asked = base.asked(len(config.prompt))
    usual = (10 if config.is_sweep else 80) if source.is_demo else 1 if is_video else 4
    num_images = config.num_images or max(usual, len(config.prompt))
    condition = asked[torch.arange(num_images) % len(asked)]
    noise = start_noise(base, num_images, config.seed)
    scales = config.guidance_scale or (source.family.guidance_scale,)
    batch_size = config.batch_size or preset_config("default", source.family.presets).train_batch_size
    samples = sweep(
        base, negative, tuned, noise, condition, scales, config.beta, config.alpha, config.num_inference_steps, batch_size
    )

    methods = [(scale, beta) for scale in scales for beta in (None, *config.beta)]
    shown = torch.cat([samples[method] for method in methods])
    plain_scale, plain = plain_guidance(base, condition, scales[0])
    if tuned and plain_scale == 1:
        plain = "the positive itself"
    share = f", alpha = {config.alpha:g}" if tuned else ""
    negatives = [f"negative, beta = {beta:g}{share}" for beta in config.beta]
    titles = [f"{plain}, w = {plain_scale - 1:g}", f"{negatives[0]}, w = {scales[0] - 1:g}"]
    caption = " | ".join((*config.prompt, str(config.negative), "equal positions start from equal noise"))
    if is_video:
        caption += " | every row is one video"
    if output.suffix in SUFFIXES:
        videos = [to_bytes(frames) for frames in decode_frames(base, shown)]
        save_video(output, titles, [videos[:num_images], videos[num_images:]], config.fps)
    elif config.is_sweep:
        cells = decode_samples(base, shown).chunk(len(methods))
        wide = 1 + len(negatives)
        rows = [cells[first : first + wide] for first in range(0, len(cells), wide)]
        names = [f"w = {scale - 1:g}" for scale in scales]
        columns = 4 if is_video else 5 if num_images > 9 else math.ceil(math.sqrt(num_images))
        save_table(output, rows, names, [titles[0] if plain_scale == 1 else plain, *negatives], columns, caption)
    else:
        cells = decode_samples(base, shown).chunk(len(methods))
        columns = 4 if is_video or len(asked) == 1 else min(len(asked), 10)
        save_comparison(output, [*zip(titles, cells, strict=True)], min(columns, len(cells[0])), caption)
    print(f"written to {output}")


if __name__ == "__main__":
    run(lambda: main(parse(SampleConfig)))
