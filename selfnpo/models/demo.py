"""The embedded demo: a class-conditional DiT on 8x8 digits that comes with the package."""

from pathlib import Path

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "weights"
