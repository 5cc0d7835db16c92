"""Matplotlib figures as PNG files."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # works without a screen
import matplotlib.pyplot as plt

from selfnpo.files import committed_file

DPI = 110


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure atomically, and close it."""
    with committed_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
