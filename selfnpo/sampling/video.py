"""Videos side by side, as GIF or MP4."""

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from selfnpo.errors import UserError
from selfnpo.files import committed_file
from selfnpo.sampling.text import draw_lines, font, line_height, wrap

GAP = 4  # pixels between videos
SMALLEST = 256  # minimum width of a video in pixels; smaller ones are enlarged
LARGEST = 28  # maximum font size of titles, in pixels
PROMPT_LINES = 2  # lines of a prompt above a row of videos
WHITE = (255, 255, 255)


def check_video(path: Path) -> None:
    """Raises: UserError if the package that writes the format is not installed."""
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError(
            f"output is {path}, but MP4 needs the package imageio-ffmpeg; run pip install 'selfnpo[video]', or choose a "
            "name that ends in .gif"
        )


def save_video(
    path: Path, titles: Sequence[str], panels: Sequence[list[Tensor]], fps: int, labels: Sequence[str] = (), text: str = ""
) -> None:
    """Save panels of videos (uint8 `[frames, H, W, 3]`) under their titles, side by side, with a row per video.

    The suffix of `path` is .gif or .mp4. GIF stores durations in whole hundredths of a second.

    Args:
        labels: a label for each row.
        text: a comment to store in the file.
    """
    frames = _frames(titles, panels, labels)
    first = next(frames)
    with committed_file(path) as partial:
        if path.suffix == ".gif":
            comment = {"comment": text.encode()} if text else {}
            first.save(partial, save_all=True, append_images=frames, duration=1000 / fps, loop=0, **comment)
            return
        import imageio_ffmpeg

        comment = ["-metadata", f"comment={text}"] if text else []
        writer = imageio_ffmpeg.write_frames(str(partial), first.size, fps=fps, macro_block_size=2, output_params=comment)
        writer.send(None)
        for frame in chain((first,), frames):
            writer.send(frame.tobytes())
        writer.close()


def _frames(titles: Sequence[str], panels: Sequence[list[Tensor]], labels: Sequence[str]) -> Iterator[Image.Image]:
    count, height, width, _ = panels[0][0].shape
    enlarged = -(-SMALLEST // width) if any(titles) else 1
    height, width = height * enlarged, width * enlarged
    across = len(panels) * (width + GAP) - GAP
    letters = font(min(max(width // 16, 14), LARGEST))
    small = font(round(0.75 * letters.size))
    heads = [wrap(title, letters, width, lines=2) for title in titles]
    head = max(map(len, heads)) * line_height(letters) + letters.size // 2 if any(heads) else 0
    prompts = [wrap(label, small, across, PROMPT_LINES) for label in labels] or [[]] * len(panels[0])
    strip = max(map(len, prompts)) * line_height(small)
    tall = strip + height + GAP
    size = (across, head + len(panels[0]) * tall - GAP)
    canvas = Image.new("RGB", tuple(side + side % 2 for side in size), WHITE)  # MP4 needs even sides
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(heads):
        middle = (column * (width + GAP) + width // 2, (head - len(lines) * line_height(letters)) // 2)
        draw_lines(draw, middle, lines, letters)
    for row, lines in enumerate(prompts):
        draw_lines(draw, (across // 2, head + row * tall), lines, small)
    for number in range(count):
        for column, videos in enumerate(panels):
            for row, video in enumerate(videos):
                frame = Image.fromarray(video[number].numpy()).resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(frame, (column * (width + GAP), head + strip + row * tall))
        yield canvas.copy()
