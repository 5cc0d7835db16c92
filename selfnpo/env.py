"""python -m selfnpo.env: what is installed here and which kernels run. Paste it into a bug report."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from selfnpo.cli import run
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


def cpu_name() -> str:
    """Model name, cores and torch threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def describe() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": _gpus(),
        "cuda (torch)": torch.version.cuda or "none",
        "kernels": dispatch.describe(),
        "selfnpo_kernels._C": extension.describe(),
    } | {package: _version(package) for package in PACKAGES}


def main() -> None:
    for name, value in describe().items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    run(main)
