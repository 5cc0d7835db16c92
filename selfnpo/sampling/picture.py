"""Contact sheets as PNG: images with their prompts, under titles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from selfnpo.files import committed_file
from selfnpo.sampling.text import INK, Font, draw_lines, font, line_height, wrap

SMALLEST, WIDEST, TALLEST = 1200, 4096, 8192  # pixels of a sheet's images: smaller ones are enlarged, larger ones reduced
WHITE, GRAY, FADED = (255, 255, 255), (90, 90, 90), (70, 70, 70)
PROMPT_LINES = 2  # lines of a prompt below an image


def to_bytes(frames: Tensor) -> Tensor:
    """Convert images `[n, 1 or 3, H, W]` in [-1, 1] to uint8 `[n, H, W, 3]`."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Sheet:
    """The layout of a picture: panels that are `columns` images wide, all with the same labels.

    Args:
        shape: (height, width) of one image.
        images: number of images in a panel.
        across, down: number of panels in a row and in a column.
        labels: a label for each sample, which is one image or several frames in a row. Empty for none.
    """

    shape: tuple[int, int]
    images: int
    columns: int
    across: int
    down: int
    labels: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return -(-self.images // self.columns)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) at which an image is shown: enlarged or reduced by an integer factor."""
        (height, width), wide = self.shape, self.across * self.columns
        larger = max(1, min(SMALLEST // (wide * width), TALLEST // (self.down * self.rows * height)))
        smaller = max(-(-wide * width // WIDEST), -(-self.down * self.rows * height // TALLEST))
        return max(1, height * larger // smaller), max(1, width * larger // smaller)

    @property
    def gap(self) -> int:
        width = self.size[1]
        return max(2, min(6, width // 8), width // 64)

    @property
    def width(self) -> int:
        """Width of a panel."""
        return self.columns * (self.size[1] + self.gap) + self.gap

    @property
    def text_size(self) -> int:
        return min(max(14, self.across * self.width // 64), 48)

    @property
    def frames(self) -> int:
        """Number of images per sample."""
        return self.images // len(self.labels) if self.labels else 1

    @property
    def by_column(self) -> bool:
        """Whether all images in a column have the same label."""
        step = self.columns // self.frames
        return all(label == self.labels[number % step] for number, label in enumerate(self.labels))

    @property
    def shown_labels(self) -> tuple[str, ...]:
        """The labels to draw; empty if all are the same, because the caption then contains it."""
        return self.labels if len(set(self.labels)) > 1 else ()

    @cached_property
    def label_font(self) -> Font:
        room = self.frames * self.size[1]
        return font(min(max(11, room // 14), round(0.8 * self.text_size)))

    @cached_property
    def label_lines(self) -> list[list[str]]:
        room = self.frames * self.size[1] - 2 * self.gap
        return [wrap(label, self.label_font, room, PROMPT_LINES) for label in self.shown_labels]

    @property
    def strip(self) -> int:
        """Height of the labels."""
        count = max(map(len, self.label_lines), default=0)
        return count * line_height(self.label_font) + (self.gap if count else 0)

    def panel(self, images: Tensor) -> Image.Image:
        """Draw the images `[n, 1 or 3, H, W]` of a panel, row by row."""
        height, width = self.size
        strip, head = self.strip, self.strip if self.by_column else 0
        tall = head + self.rows * (height + self.gap + (0 if head else strip)) + self.gap
        canvas = Image.new("RGB", (self.width, tall), WHITE)
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((0, head, self.width, tall), fill=WHITE if strip and not head else GRAY)
        for number, pixels in enumerate(to_bytes(images.cpu()).numpy()):
            row, column = divmod(number, self.columns)
            x, y = self.gap + column * (width + self.gap), head + self.gap + row * (height + self.gap + strip - head)
            canvas.paste(resized(Image.fromarray(pixels), (width, height)), (x, y))
            sample, frame = divmod(number, self.frames)
            if strip and frame == 0 and (row == 0 or not head):
                middle = x + (self.frames * (width + self.gap) - self.gap) / 2
                top = 0 if head else y + height + self.gap // 2
                draw_lines(draw, (middle, top), self.label_lines[sample], self.label_font)
        return canvas

    def caption(self, caption: str) -> str:
        """Extend `caption` with a label that all images share, and with the size if they are reduced."""
        (height, width), (tall, wide) = self.shape, self.size
        scale = f"images reduced from {width}x{height} to {wide}x{tall} pixels" if wide < width else ""
        label = f"“{self.labels[0]}”" if self.labels and self.labels[0] and not self.shown_labels else ""
        return " | ".join(filter(None, (label, caption, scale)))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarge with sharp pixels, or reduce smoothly."""
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.NEAREST if size[0] > image.width else Image.Resampling.LANCZOS)


def save_comparison(
    path: Path,
    panels: Sequence[tuple[str, Tensor]],
    columns: int,
    caption: str,
    labels: Sequence[str] = (),
    text: Mapping[str, str] | None = None,
) -> None:
    """Save panels of images under their titles, two per row. Images in the same position belong together.

    Args:
        labels: a label for each sample, the same in all panels.
        text: metadata, see metadata.py.
    """
    images = panels[0][1]
    sheet = Sheet((*images.shape[-2:],), len(images), columns, 2, -(-len(panels) // 2), tuple(labels))
    rows = [list(panels[first : first + 2]) for first in range(0, len(panels), 2)]
    _save(path, sheet, rows, [], caption, text)


def save_table(
    path: Path,
    cells: Sequence[Sequence[Tensor]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    columns: int,
    caption: str,
    labels: Sequence[str] = (),
    text: Mapping[str, str] | None = None,
) -> None:
    """Save a table with one panel per cell, `columns` images wide. Images in the same position belong together."""
    images = cells[0][0]
    sheet = Sheet((*images.shape[-2:],), len(images), columns, len(column_names), len(row_names), tuple(labels))
    names = [column_names, *[[""] * len(column_names)] * (len(row_names) - 1)]
    _save(path, sheet, [list(zip(*row, strict=True)) for row in zip(names, cells, strict=True)], row_names, caption, text)


def _save(
    path: Path,
    sheet: Sheet,
    rows: list[list[tuple[str, Tensor]]],
    row_names: Sequence[str],
    caption: str,
    text: Mapping[str, str] | None,
) -> None:
    letters, small = font(sheet.text_size), font(round(0.75 * sheet.text_size))
    margin = sheet.text_size
    left = max((letters.getlength(line) for name in row_names for line in name.split("\n")), default=-margin) + 2 * margin
    left, apart = round(left), margin
    width = left + len(rows[0]) * (sheet.width + apart) - apart + margin
    titles = [[_title(title, letters, sheet.width) for title, _ in row] for row in rows]
    tall = sheet.panel(rows[0][0][1][:0]).height
    heads = [max(map(len, row)) * line_height(letters) + (margin // 2 if any(row) else 0) for row in titles]
    lines = wrap(sheet.caption(caption), small, width - 2 * margin, lines=6)
    height = margin + sum(heads) + len(rows) * (tall + apart) + len(lines) * line_height(small) + margin // 2
    canvas = Image.new("RGB", (width, height), WHITE)
    draw, y = ImageDraw.Draw(canvas), margin
    for number, (row, head) in enumerate(zip(rows, heads, strict=True)):
        for column, (_, images) in enumerate(row):
            x = left + column * (sheet.width + apart)
            draw_lines(draw, (x + sheet.width // 2, y), titles[number][column], letters)
            canvas.paste(sheet.panel(images), (x, y + head))
        if row_names:
            middle = (margin + (left - 2 * margin) // 2, y + head + tall // 2)
            draw.multiline_text(
                middle, row_names[number], INK, letters, anchor="mm", align="center", spacing=sheet.text_size // 2
            )
        y += head + tall + apart
    draw_lines(draw, (width // 2, y), lines, small, FADED)
    save_png(path, canvas, text)


def _title(title: str, letters: Font, width: int) -> list[str]:
    return [part for line in title.split("\n") for part in wrap(line, letters, width, lines=2)]


def save_png(path: Path, image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Write an image atomically, with `text` as metadata."""
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_text(name, value)
    with committed_file(path) as partial:
        image.save(partial, format="png", pnginfo=info)
