"""Sample grids as PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

from selfnpo.files import committed_file

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
    title_lines = max(title.count("\n") + 1 for title, _ in panels)
    tall = rows * ((inches / 2 - 0.1) * height / width + 0.2 + 0.2 * title_lines) + 0.1 + 0.2 * len(lines)
    figure, axes = plt.subplots(rows, 2, figsize=(inches, tall), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, _), sheet in zip(axes.flat, panels, sheets, strict=False):
        _show(axis, sheet)
        axis.set_title(title, fontsize=12)
    figure.supxlabel("\n".join(lines), fontsize=10, color="0.35")
    save_figure(figure, path)


def save_table(
    path: Path,
    cells: Sequence[Sequence[Tensor]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    columns: int,
    caption: str,
) -> None:
    """A sheet of images per cell, `columns` images wide, under the names of rows and columns; equal positions belong to each
    other."""
    sheets = [[tile(images, columns) for images in row] for row in cells]
    height, width, _ = sheets[0][0].shape
    inches = min(max(11, len(column_names) * width / DPI), 40)
    lines = textwrap.wrap(caption, int(14 * inches))
    across = (inches - 0.4) / len(column_names) - 0.1  # inches of a cell
    tall = len(row_names) * (across * height / width + 0.1) + 0.5 + 0.2 * len(lines)
    figure, axes = plt.subplots(
        len(row_names), len(column_names), figsize=(inches, tall), layout="constrained", squeeze=False
    )
    for row, name in zip(axes, row_names, strict=True):
        row[0].set_ylabel(name, fontsize=13)
    for axis, name in zip(axes[0], column_names, strict=True):
        axis.set_title(name, fontsize=13)
    for axis, sheet in zip(axes.flat, (sheet for row in sheets for sheet in row), strict=True):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        _show(axis, sheet)
    figure.supxlabel("\n".join(lines), fontsize=10, color="0.35")
    save_figure(figure, path)


def _show(axis: plt.Axes, sheet: Tensor) -> None:
    axis.imshow(sheet.numpy(), interpolation="nearest" if sheet.shape[1] < 4 * DPI else "auto")


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    with committed_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
