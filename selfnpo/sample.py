"""python -m selfnpo.sample: compare plain guidance with guidance away from a negative model, from the same noise."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfnpo.cli import parse, run
from selfnpo.errors import UserError
from selfnpo.inputs.prompts import read_prompts
from selfnpo.models import Source
from selfnpo.models.origin import check_exists
from selfnpo.options import NONE
from selfnpo.output import check_output
from selfnpo.sampling.config import FPS_OF_GIF, ON_A_SHEET, RECORD, VIDEOS, SampleConfig, check

if TYPE_CHECKING:
    from selfnpo.sampling.folder import SampleFolder


def output_file(config: SampleConfig, is_video: bool) -> Path:
    """The path of the contact sheet; its suffix decides the format.

    Raises:
        UserError: the format does not suit the samples, or its package is missing.
    """
    from selfnpo.sampling.video import check_video

    movable = is_video and not config.is_sweep
    output = config.output or Path("samples.gif" if movable else "samples.png")
    if config.output is None and not config.overwrite:
        names = (output.with_stem(f"{output.stem}-{number}") for number in itertools.count(2))
        output = next(path for path in itertools.chain((output,), names) if not path.exists())
    if output.suffix not in (".png", *(VIDEOS if movable else ())):
        why = "a sweep is written as one picture" if is_video else "the model makes images"
        expected = ".png, .gif or .mp4" if movable else f".png, because {why}"
        raise UserError(f"output is {output}; expected a file name that ends in {expected}")
    check_video(output)
    return output


def check_writable(output: Path) -> None:
    try:
        tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}").close()
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}; choose another") from error


def output_folder(config: SampleConfig, is_video: bool) -> "SampleFolder":
    """The folder for single files.

    Raises:
        UserError: they cannot be written there.
    """
    from selfnpo.sampling.folder import SampleFolder
    from selfnpo.sampling.video import check_video

    suffix = f".{config.video_format or 'gif'}" if is_video else ".png"
    folder = SampleFolder(config.output_dir, suffix)
    check_video(folder.path("", 0))
    return folder


def image_count(config: SampleConfig, prompts: Sequence[str], usual: int) -> int:
    """Number of images or videos per method."""
    if config.num_images and config.num_images < len(prompts):
        print(f"note: num_images is {config.num_images}, so not all {len(prompts)} prompts are used")
    if config.output_dir is not None:
        return config.num_images or len(prompts) or usual
    count = config.num_images or max(usual, len(prompts))
    if count > ON_A_SHEET:
        raise UserError(f"got {count} prompts, but a contact sheet holds up to {ON_A_SHEET} images; pass --output_dir")
    return count


def check_fps(config: SampleConfig, suffix: str) -> None:
    """Raise a UserError if files with this suffix cannot show `fps`."""
    if config.fps is None:
        return
    if suffix not in VIDEOS:
        raise UserError(f"fps is {config.fps}, but {suffix} files do not move; leave it out")
    if suffix == ".gif" and config.fps > FPS_OF_GIF:
        raise UserError(f"fps is {config.fps}, but a GIF shows up to {FPS_OF_GIF}; choose a lower value or MP4")


def check_files(config: SampleConfig) -> tuple[str, ...]:
    """Checks that need neither the model nor PyTorch. Returns the prompts; empty means the default ones."""
    prompts = config.prompt if config.prompts == NONE else tuple(read_prompts(config.prompts))
    if config.output is not None:
        if not config.output.parent.is_dir():
            raise UserError(
                f"output {config.output} lies in a folder that does not exist; create {config.output.parent} first"
            )
        if config.output.is_file() and not config.overwrite:
            raise UserError(f"output {config.output} exists; choose another name or pass --overwrite")
        if config.output.suffix not in (".png", *VIDEOS):
            raise UserError(f"output is {config.output}; expected a file name that ends in .png, .gif or .mp4")
        if config.output.is_dir():
            raise UserError(f"output {config.output} is a folder; choose another name")
    if config.output_dir is not None:
        check_folder(config.output_dir, config.overwrite)
    else:
        check_writable(config.output or Path("samples.png"))
    for name in filter(None, (config.negative, config.positive)):
        check_exists(str(name), config)
    return prompts


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise a UserError if single files cannot be written there, or if the folder contains anything else."""
    # Not even with overwrite: `negative` may be a model.
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UserError(
            f"output_dir {folder} is not empty and has no {RECORD}, so its files are not samples from this command; "
            "choose another folder"
        )
    check_output(folder, overwrite)


def main(config: SampleConfig) -> None:
    check(config)
    config.name_default(config.pretrained_model_name_or_path)
    prompts = check_files(config)
    print("loading PyTorch and diffusers")
    source = Source(config)
    import torch  # imported here so that mistakes are reported before PyTorch loads

    from selfnpo.device import dtype_of
    from selfnpo.models import check_negative, load_pretrained
    from selfnpo.sampling.comparison import Comparison
    from selfnpo.sampling.folder import SampleFolder
    from selfnpo.schedule import make_grid

    make_grid(source.scheduler, config.num_inference_steps)  # validate before slow work
    is_video = len(source.family.sample_shape(source.config, source.scale, config)) == 4
    if config.video_format and (config.output_dir is None or not is_video):
        raise UserError(f"video_format is {config.video_format}, which is only for videos in an output_dir; leave it out")
    usual = (10 if config.is_sweep else 80) if source.is_demo else 1 if is_video else 4
    count = image_count(config, prompts, usual)
    output = output_file(config, is_video) if config.output_dir is None else output_folder(config, is_video)
    check_fps(config, output.suffix)
    for name in filter(None, (config.negative, config.positive)):
        check_negative(name, source)

    dtype, host = dtype_of(config.mixed_precision), torch.device("cpu")  # the models are mixed there
    base = load_pretrained(config, config, further_prompts=prompts, dtype=dtype, weights_device=host)
    comparison = Comparison(config, base, prompts, count)
    if isinstance(output, SampleFolder):
        comparison.save_folder(output)
    else:
        comparison.save_sheet(output)
        print(f"written to {output}")


def command(args: Sequence[str] | None = None) -> None:
    main(parse(SampleConfig, args))


if __name__ == "__main__":
    run(command)
