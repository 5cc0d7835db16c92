"""Text in pictures: the same font on every machine, wrapped, and shortened with an ellipsis if it does not fit."""

import importlib.util
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

ELLIPSIS = "…"
INK = (0, 0, 0)
Font = ImageFont.FreeTypeFont


@cache
def font(size: int) -> Font:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font only has Latin letters."""
    folder = Path(importlib.util.find_spec("matplotlib").origin).parent  # found, not imported
    return ImageFont.truetype(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def line_height(of: Font) -> int:
    return round(1.3 * of.size)


def shorten(text: str, of: Font, width: float) -> str:
    """Shorten `text` to one line of at most `width` pixels."""
    text = " ".join(text.split())
    if of.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # numbers of characters that fit, and that do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of.getlength(text[:middle] + ELLIPSIS) <= width else (low, middle)
    return text[:low].rstrip() + ELLIPSIS


def wrap(text: str, of: Font, width: float, lines: int) -> list[str]:
    """Wrap `text` between words into at most `lines` lines of `width` pixels, and cut off the rest."""
    found, words = [], text.split()
    while words and len(found) < lines - 1:
        count = next((n for n in range(len(words), 1, -1) if of.getlength(" ".join(words[:n])) <= width), 1)
        found.append(shorten(words[0], of, width) if count == 1 else " ".join(words[:count]))
        words = words[count:]
    return [*found, shorten(" ".join(words), of, width)] if words else found


def draw_lines(
    draw: ImageDraw.ImageDraw, middle: tuple[float, float], lines: list[str], of: Font, color: tuple[int, int, int] = INK
) -> None:
    """Draw lines of text, centred below the point `middle`."""
    x, y = middle
    for number, line in enumerate(lines):
        draw.text((x, y + number * line_height(of)), line, fill=color, font=of, anchor="ma")
