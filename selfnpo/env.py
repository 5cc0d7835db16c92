"""python -m selfnpo.env: what is installed here and which kernels run. Paste it into a bug report."""

import importlib.metadata
import platform

import torch

from selfnpo.cli import run
from selfnpo.device import cpu_name
from selfnpo_kernels import dispatch, extension

PACKAGES = (
    "selfnpo",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "xformers",
    "numpy",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def installation() -> dict[str, str]:
    """What a bug report needs, by name."""
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": _gpus(),
        "cuda (torch)": torch.version.cuda or "none",
        "kernels": dispatch.summary(),
        "selfnpo_kernels._C": extension.state(),
    } | {package: _version(package) for package in PACKAGES}


def main() -> None:
    for name, value in installation().items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    run(main)
