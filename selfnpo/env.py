"""python -m selfnpo.env: installed versions and available kernels, for bug reports."""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass

from selfnpo.cli import parse, run

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


@dataclass(frozen=True)
class EnvConfig:
    """Print versions, the machine and the kernels that run here, to paste into a bug report. There are no flags."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def installation() -> dict[str, str]:
    """The lines of a bug report: name and value."""
    import torch  # imported here so that --help does not load PyTorch

    from selfnpo.device import cpu_name
    from selfnpo_kernels import dispatch, extension

    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": _gpus(),
        "cuda (torch)": torch.version.cuda or "none",
        "kernels": dispatch.summary(),
        "selfnpo_kernels._C": extension.state(),
    } | {package: _version(package) for package in PACKAGES}


def command(args: Sequence[str] | None = None) -> None:
    parse(EnvConfig, args)
    for name, value in installation().items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    run(command)
