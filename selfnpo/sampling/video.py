"""Videos side by side, as GIF or MP4."""

import importlib.util
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfnpo.errors import UserError
from selfnpo.files import committed_file

SUFFIXES = (".gif", ".mp4")
GAP = 4  # pixels between videos
SMALLEST = 256  # pixels that a video is wide; smaller ones are enlarged
LARGEST = 28  # pixels, of titles
BACKGROUND = (255, 255, 255)


def check_video(path: Path) -> None:
    """Raises: UserError where what writes the format is not installed."""
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError(
            f"output is {path}, and MP4 needs the package imageio-ffmpeg; run pip install 'selfnpo[video]', or choose a "
            "name that ends in .gif"
        )


def to_bytes(frames: Tensor) -> Tensor:
    """uint8 `[frames, H, W, 3]` of `[frames, 1 or 3, H, W]` in [-1, 1]."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def save_video(path: Path, titles: list[str], panels: list[list[Tensor]], fps: int) -> None:
    """Panels of videos (uint8 `[frames, H, W, 3]`) under their titles, side by side and all at once; a row per video.

    The suffix of `path` is .gif or .mp4. GIF knows durations of whole hundredths of a second.
    """
    frames = _frames(titles, panels)
    first = next(frames)
    with committed_file(path) as partial:
        if path.suffix == ".gif":
            first.save(partial, save_all=True, append_images=frames, duration=1000 / fps, loop=0)
            return
        import imageio_ffmpeg

        writer = imageio_ffmpeg.write_frames(str(partial), first.size, fps=fps, macro_block_size=2)
        writer.send(None)
        for frame in chain((first,), frames):
            writer.send(frame.tobytes())
        writer.close()


def _frames(titles: list[str], panels: list[list[Tensor]]) -> Iterator[Image.Image]:
    count, height, width, _ = panels[0][0].shape
    enlarged = -(-SMALLEST // width)
    height, width = height * enlarged, width * enlarged
    longest = max(ImageFont.load_default(100).getlength(title) for title in titles)
    font = ImageFont.load_default(min(95 * width / longest, LARGEST))
    head = round(2 * font.size)
    size = (len(panels) * (width + GAP) - GAP, head + len(panels[0]) * (height + GAP) - GAP)
    canvas = Image.new("RGB", tuple(side + side % 2 for side in size), BACKGROUND)  # MP4 takes even sides only
    for column, title in enumerate(titles):
        middle = (column * (width + GAP) + width // 2, head // 2)
        ImageDraw.Draw(canvas).text(middle, title, fill="black", font=font, anchor="mm")
    for number in range(count):
        for column, videos in enumerate(panels):
            for row, video in enumerate(videos):
                frame = Image.fromarray(video[number].numpy()).resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(frame, (column * (width + GAP), head + row * (height + GAP)))
        yield canvas.copy()
