"""Sample grids as PNG."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

DPI = 110
GAP = 0.35  # gray between images


def tile(images: Tensor, columns: int) -> Tensor:
    """One sheet `[H, W, 3]` in [0, 1] of images `[n, 1 or 3, h, w]` in [-1, 1], row by row with a gap around them."""
    padded = functional.pad(images.float().cpu().clamp(-1, 1) / 2 + 0.5, (1, 0, 1, 0), value=GAP).expand(-1, 3, -1, -1)
    count, _, height, width = padded.shape
    rows = -(-count // columns)
    sheet = torch.full((rows * columns, 3, height, width), GAP)
    sheet[:count] = padded
    joined = sheet.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return functional.pad(joined, (0, 0, 0, 1, 0, 1), value=GAP)


def save_comparison(path: Path, panels: list[tuple[str, Tensor]], columns: int, caption: str) -> None:
    """Panels of images under their titles, two side by side; equal positions belong to each other."""
    sheets = [tile(images, columns) for _, images in panels]
    height, width, _ = sheets[0].shape
    rows = -(-len(panels) // 2)
    inches = min(max(11, 2 * width / DPI), 40)  # large images in their own size
    lines = textwrap.wrap(caption, int(14 * inches))
    tall = rows * (inches / 2 * height / width + 0.5) + 0.2 + 0.2 * len(lines)
    figure, axes = plt.subplots(rows, 2, figsize=(inches, tall), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, _), sheet in zip(axes.flat, panels, sheets, strict=False):
        axis.imshow(sheet.numpy(), interpolation="nearest" if width < 4 * DPI else "auto")
        axis.set_title(title, fontsize=12)
    figure.supxlabel("\n".join(lines), fontsize=10, color="0.35")
    save_figure(figure, path)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=DPI)
    partial.replace(path)
    plt.close(figure)
