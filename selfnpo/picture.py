"""Sample grids as PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

GAP = 0.35  # gray between images


def tile(images: Tensor, columns: int) -> Tensor:
    """One grayscale sheet in [0, 1] of images `[n, 1, H, W]` in [-1, 1], row by row with a gap around them."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((rows, columns, height + 1, width + 1), GAP)
    sheet.view(-1, height + 1, width + 1)[:count, 1:, 1:] = images[:, 0].clamp(-1, 1) / 2 + 0.5
    joined = sheet.permute(0, 2, 1, 3).reshape(rows * (height + 1), columns * (width + 1))
    return functional.pad(joined, (0, 1, 0, 1), value=GAP)


def save_comparison(path: Path, panels: list[tuple[str, Tensor]], columns: int, caption: str) -> None:
    """Panels of images under their titles, two side by side; equal positions belong to each other."""
    sheets = [tile(images, columns) for _, images in panels]
    height, width = sheets[0].shape
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(11, rows * (5.5 * height / width + 0.5) + 0.4), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, _), sheet in zip(axes.flat, panels, sheets, strict=False):
        axis.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=12)
    figure.supxlabel(caption, fontsize=10, color="0.35")
    save_figure(figure, path)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    partial.replace(path)
    plt.close(figure)
