"""The packages that pyproject.toml declares."""

import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# Where the name of a package is not the name of its module.
MODULES = {
    "pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn", "nvidia-ml-py": "pynvml",
    "imageio-ffmpeg": "imageio_ffmpeg", "huggingface-hub": "huggingface_hub", "pytest-xdist": "xdist",
    "pytest-benchmark": "pytest_benchmark", "clang-format": "clang_format",
}  # fmt: skip


def declared(extra: str = "") -> set[str]:
    """Names of the packages in pyproject.toml, of an extra or of what everyone gets."""
    text = (ROOT / "pyproject.toml").read_text()
    start = text.index(f"\n{extra} = [" if extra else "\ndependencies = [")
    lines = (line.split("  #")[0] for line in text[start : text.index("]\n", start)].splitlines())
    found = re.findall(r"\"([^\"]+)\"", "\n".join(lines))
    return {Requirement(requirement).name.lower().replace("_", "-") for requirement in found}
