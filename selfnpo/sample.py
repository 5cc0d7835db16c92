"""python -m selfnpo.sample: plain guidance beside guidance away from a negative model, from the same noise."""

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tyro.conf import arg

from selfnpo.cli import parse, run
from selfnpo.config import Precision, dtype_of, preset_config
from selfnpo.errors import UserError
from selfnpo.inputs.prompts import NONE, read_prompts
from selfnpo.mixing import MixOptions
from selfnpo.models import (
    ModelOptions,
    PretrainedModel,
    SampleOptions,
    Source,
    check_negative,
    load_negative,
    load_pretrained,
)
from selfnpo.sampling.ddim import plain_guidance, title
from selfnpo.sampling.decode import decode_frames, decode_samples, open_vae
from selfnpo.sampling.folder import SampleFolder, folder_names
from selfnpo.sampling.metadata import png_text
from selfnpo.sampling.picture import save_comparison, save_table, to_bytes
from selfnpo.sampling.sweep import Method, Missing, methods, sweep
from selfnpo.sampling.video import SUFFIXES, check_video, save_video
from selfnpo.schedule import make_grid

ON_A_SHEET = 1000  # images of a method that a contact sheet shows at most
MIXED = ("negative", "positive", "alpha", "beta", "num_inference_steps", "seed")
LOADED = ("pretrained_model_name_or_path", "denoiser_name_or_path", "lora_name_or_path", "negative", "positive")


@dataclass(frozen=True)
class SampleConfig(MixOptions, SampleOptions, ModelOptions):
    """Sample with and without a negative model: a contact sheet, or with --output_dir one file per image. Several guidance
    scales or betas make a sweep."""

    prompt: tuple[str, ...] = ()
    """What to sample, cycled over the images: prompts, or class numbers. By default every class, or the empty prompt."""
    prompts: str = NONE
    """File with one prompt (or class number) a line, or .jsonl, as for training; in place of --prompt."""
    beta: Annotated[tuple[float, ...], arg(aliases=("--betas",))] = (1.0,)
    """Strength of the negative: its share of delta. Several make a sweep."""
    guidance_scale: Annotated[tuple[float, ...], arg(aliases=("--guidance_scales",))] = ()
    """Guidance scale as in diffusers, where 1 means no guidance; by default the usual one of the model's family. Several
    make a sweep."""
    num_images: int | None = None
    """Images, or videos, per method. By default one per prompt, in a contact sheet at least 4 (80 of the demo, 10 in its
    sweeps, 1 video)."""
    batch_size: int | None = None
    """Images per forward pass; by default the family's batch size in training."""
    mixed_precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 on GPUs that have it and no (float32) elsewhere."""
    num_inference_steps: int = 25
    """DDIM steps."""
    seed: int = 0
    """Seed of the noise: image number i always starts from the noise of (seed, i)."""
    fps: int = 8
    """Frames per second of a video."""
    output: Path | None = None
    """Contact sheet to write: .png, of videos also .gif or .mp4. By default samples.png (samples.gif of videos), or
    samples-2.png and so on where that exists."""
    output_dir: Path | None = None
    """Write one file per image into this folder instead, in cfg/ and negative/ under equal names; the same command again
    goes on where it was stopped."""
    video_format: Literal["gif", "mp4"] | None = None
    """Format of the videos in output_dir; by default gif."""
    overwrite: bool = False
    """Replace what exists: the output, or the samples in output_dir."""

    @property
    def is_sweep(self) -> bool:
        return len(self.guidance_scale) > 1 or len(self.beta) > 1


def check(config: SampleConfig) -> None:
    most = ON_A_SHEET if config.output_dir is None else 1_000_000
    for name, low, high in (
        ("num_images", 1, most),
        ("batch_size", 1, 10_000),
        ("seed", 0, 2**63 - 1),
        ("fps", 1, 60),
    ):
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            more = "; --output_dir takes more" if (name, high) == ("num_images", ON_A_SHEET) and value > high else ""
            raise UserError(f"{name} is {value}; expected a value from {low} to {high}{more}")
    for scale in config.guidance_scale:
        if not 1 < scale <= 100:
            raise UserError(
                f"guidance_scale is {scale}; expected a value above 1 and up to 100, since at 1 there is no guidance and "
                "the negative would do nothing"
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


def output_file(config: SampleConfig, is_video: bool) -> Path:
    """The contact sheet to write, whose suffix says what it is.

    Raises:
        UserError: it cannot be written, or cannot hold what is asked for.
    """
    movable = is_video and not config.is_sweep
    output = config.output or Path("samples.gif" if movable else "samples.png")
    if config.output is None and not config.overwrite:
        names = (output.with_stem(f"{output.stem}-{number}") for number in itertools.count(2))
        output = next(path for path in itertools.chain((output,), names) if not path.exists())
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


def output_folder(config: SampleConfig, settings: dict[str, Any], is_video: bool) -> SampleFolder:
    """Where single files go.

    Raises:
        UserError: they cannot be written there.
    """
    suffix = f".{config.video_format or 'gif'}" if is_video else ".png"
    folder = SampleFolder(config.output_dir, settings, suffix)
    check_video(folder.path("", 0))
    folder.check(config.overwrite)
    return folder


def settings_of(config: SampleConfig, prompts: Sequence[str], scales: Sequence[float], is_demo: bool) -> dict[str, Any]:
    """All that the samples depend on, in JSON's types."""
    values = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path}
    for field in (*fields(ModelOptions), *fields(SampleOptions)):
        if field.name != "local_files_only" and (value := getattr(config, field.name)) != field.default:
            values[field.name] = value
    values |= {name: getattr(config, name) for name in MIXED if getattr(config, name) is not None}
    values |= {name: str(value) for name, value in values.items() if isinstance(value, Path)}
    values |= {"guidance_scale": scales, "dtype": str(dtype_of(config.mixed_precision)).removeprefix("torch.")}
    values["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    for name in LOADED:
        if not (is_demo and name == "pretrained_model_name_or_path") and (date := _modified(values.get(name))):
            values[f"{name}_modified"] = date
    return values


def _modified(name: str | None) -> str | None:
    """When the weights of a model on this machine were last written: a model that is trained again is another one."""
    path = Path(name or "")
    files = [path] if path.is_file() else [*path.rglob("*.safetensors")] if name and path.is_dir() else []
    newest = max((file.stat().st_mtime for file in files), default=None)
    return None if newest is None else datetime.fromtimestamp(newest).isoformat()


def image_count(config: SampleConfig, prompts: Sequence[str], usual: int) -> int:
    """Images, or videos, per method."""
    if config.output_dir is not None:
        return config.num_images or len(prompts) or usual
    count = config.num_images or max(usual, len(prompts))
    if count > ON_A_SHEET:
        raise UserError(f"got {count} prompts, but a contact sheet holds up to {ON_A_SHEET} images; pass --output_dir")
    return count


class Comparison:
    """Samples of plain guidance and of the negative, and how they are written.

    Args:
        prompts: what is asked for, in turn; empty: every class, or nothing.
        settings: see `settings_of`.
    """

    def __init__(
        self, config: SampleConfig, base: PretrainedModel, prompts: Sequence[str], count: int, settings: dict[str, Any]
    ):
        self.config, self.base, self.settings = config, base, settings
        asked = base.asked(len(prompts))
        turn = torch.arange(count) % len(asked)
        self.condition = asked[turn]
        names = prompts or [str(number) if len(asked) > 1 else "" for number in range(len(asked))]
        self.prompts = [names[number] for number in turn.tolist()]
        self.wide = min(len(asked), 10) if len(asked) > 1 else 4  # images in a row of a panel
        self.methods = methods(base, self.condition, settings["guidance_scale"], config.beta)

    def samples(self, missing: Missing | None = None) -> Iterator[tuple[Method, Sequence[int], Tensor]]:
        """As `sweep` has them."""
        config, base = self.config, self.base
        negative = load_negative(config.negative, base)
        tuned = load_negative(config.positive, base) if config.positive else None
        batch_size = config.batch_size or preset_config("default", base.family.presets).train_batch_size
        wanted = [method for row in self.methods for method in row]
        return sweep(
            base, negative, tuned, self.condition, wanted, config.seed, config.alpha, config.num_inference_steps, batch_size,
            missing,
        )  # fmt: skip

    def save_sheet(self, path: Path) -> None:
        """All samples as one picture, or as one video."""
        collected: dict[Method, list[Tensor]] = {}
        for method, _, batch in self.samples():
            collected.setdefault(method, []).append(batch)
        config, base, vae = self.config, self.base, open_vae(self.base)
        latents = {method: torch.cat(batches) for method, batches in collected.items()}
        labels = self.prompts if any(self.prompts) else []
        settings = self.settings | {"prompts": self.prompts}
        plain, guided = self.methods[0][:2]
        share = f", alpha = {config.alpha:g}" if config.positive else ""
        negatives = [f"negative, beta = {beta:g}{share}" for beta in config.beta]
        titles = [title(self._plain_name, plain.guidance_scale), title(negatives[0], guided.guidance_scale)]
        if path.suffix in SUFFIXES:
            videos = [[to_bytes(frames) for frames in decode_frames(base, latents[each], vae)] for each in (plain, guided)]
            save_video(path, titles, videos, config.fps, labels, png_text(settings)["selfnpo"])
            return
        images = {method: decode_samples(base, samples, vae) for method, samples in latents.items()}
        frames = len(images[plain]) // len(self.prompts)
        caption = f"negative model: {config.negative} | equal positions start from equal noise"
        text = png_text(settings)
        if frames > 1:
            caption += f" | {frames} frames of every video"
        if config.is_sweep:
            count = len(self.prompts)
            columns = frames if frames > 1 else 5 if count > 9 else math.ceil(math.sqrt(count))
            names = [f"guidance_scale\n{scale:g}" for scale in self.settings["guidance_scale"]]
            cells = [[images[method] for method in row] for row in self.methods]
            head = titles[0] if plain.guidance_scale == 1 else self._plain_name
            save_table(path, cells, names, [head, *negatives], columns, caption, labels, text)
        else:
            columns = frames if frames > 1 else min(self.wide, len(self.prompts))
            panels = [(name, images[method]) for name, method in zip(titles, (plain, guided), strict=True)]
            save_comparison(path, panels, columns, caption, labels, text)

    def save_folder(self, folder: SampleFolder) -> None:
        """One file per sample, batch by batch."""
        names = folder_names((method for row in self.methods for method in row), self.config.positive is not None)
        folder.prepare(list(names.values()), self.prompts, self.config.overwrite)
        vae, made = open_vae(self.base), 0
        for method, numbers, latents in self.samples(lambda method, batch: folder.missing(names[method], batch)):
            for number, frames in zip(numbers, decode_frames(self.base, latents, vae), strict=True):
                folder.save(names[method], number, frames, self._settings(method, number), self.config.fps)
                made += 1
        count, there = len(self.prompts), len(self.prompts) * len(names) - made
        found = f" ({there} were there already)" if there else ""
        print(f"written to {folder.folder}: {count} samples each in {', '.join(map('{}/'.format, names.values()))}{found}")

    @property
    def _plain_name(self) -> str:
        name = plain_guidance(self.base, self.condition, self.settings["guidance_scale"][0])[1]
        return "the positive itself" if self.config.positive and self.methods[0][0].guidance_scale == 1 else name

    def _settings(self, method: Method, number: int) -> dict[str, Any]:
        """Of one sample."""
        values = {"prompt": self.prompts[number]} | self.settings | {"guidance_scale": method.guidance_scale}
        others = {"prompts"} if method.beta is not None else {"prompts", "beta", "alpha", "negative", "negative_modified"}
        beta = {} if method.beta is None else {"beta": method.beta}
        return {name: value for name, value in (values | beta).items() if name not in others}


def main(config: SampleConfig) -> None:
    check(config)
    prompts = config.prompt if config.prompts == NONE else tuple(read_prompts(config.prompts))
    source = Source(config)
    make_grid(source.scheduler, config.num_inference_steps)  # refused before slow work
    is_video = len(source.family.sample_shape(source.config, source.scale, config)) == 4
    if config.video_format and (config.output_dir is None or not is_video):
        raise UserError(f"video_format is {config.video_format}, but there are no videos in an output_dir; leave it out")
    usual = (10 if config.is_sweep else 80) if source.is_demo else 1 if is_video else 4
    count = image_count(config, prompts, usual)
    settings = settings_of(config, prompts, config.guidance_scale or (source.family.guidance_scale,), source.is_demo)
    output = output_file(config, is_video) if config.output_dir is None else output_folder(config, settings, is_video)
    if isinstance(output, SampleFolder) and not config.overwrite and output.is_complete(count):
        print(f"nothing to do: {output.folder} already holds all {count} samples of every method")
        return
    for name in filter(None, (config.negative, config.positive)):
        check_negative(name, source)

    dtype, host = dtype_of(config.mixed_precision), torch.device("cpu")  # where the models are mixed
    base = load_pretrained(config, config, further_prompts=prompts, dtype=dtype, weights_device=host)
    comparison = Comparison(config, base, prompts, count, settings)
    if isinstance(output, SampleFolder):
        comparison.save_folder(output)
    else:
        comparison.save_sheet(output)
        print(f"written to {output}")


if __name__ == "__main__":
    run(lambda: main(parse(SampleConfig)))
