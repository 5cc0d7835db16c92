"""Checks of settings against model and machine, made before any weights are loaded."""

import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from selfnpo.config import TrainConfig
from selfnpo.errors import UserError, first_line
from selfnpo.models import Source
from selfnpo.schedule import make_grid
from selfnpo.training.attention import check_xformers
from selfnpo.training.without_effect import check_effect
from selfnpo_kernels.dispatch import triton_failure


def capture_obstacle(config: TrainConfig, device: torch.device) -> str:
    """Why a step with these settings cannot be captured in a CUDA graph; empty if it can."""
    if device.type != "cuda":
        return "CUDA graphs need an NVIDIA GPU, and there is none"
    if config.rollout != "pool":
        return f"rollout is {config.rollout}, whose batches vary in size; those of pool do not"
    if config.low_vram:
        return "low_vram keeps weights or prompts on the host"
    if config.use_8bit_adam:
        return "use_8bit_adam counts its steps on the host"
    if config.mixed_precision == "fp16":
        return "mixed_precision is fp16, whose loss scale changes from step to step; bf16 has none"
    return ""


def strategies(config: TrainConfig, device: torch.device) -> list[str]:
    """The ways of selfnpo/training/tandem.py to run reference and student that work here."""
    found = ["sequential"]
    if config.rollout != "pool":
        return found
    if not capture_obstacle(config, device) and config.capture != "off":
        found.append("streams")
    plain = not config.compile and config.attention != "xformers"  # only plain PyTorch handles pairs of tensors
    if config.rank and plain and config.rollout_guidance_scale in (0, 1):
        found.append("shared")
    return found


def check_supported(config: TrainConfig, source: Source, device: torch.device) -> None:
    """Refuse settings that cannot work, before weights are loaded.

    Raises:
        UserError: settings exclude each other or would change nothing, or the model or this machine does not support them.
    """
    check_effect(config, source)
    make_grid(source.scheduler, config.num_inference_steps)
    reason = capture_obstacle(config, device)
    if config.capture == "on" and reason:
        raise UserError(f"capture is on, but {reason}; leave --capture out, or change that")
    possible = strategies(config, device)
    if config.tandem not in ("auto", *possible):
        needs = {
            "streams": "a step captured in a CUDA graph" + (f" ({reason})" if reason else ""),
            "shared": "a LoRA (--rank), rollout pool with rollout_guidance_scale 0 or 1, and neither --compile nor xformers",
        }[config.tandem]
        raise UserError(f"tandem is {config.tandem}, which needs {needs}; expected auto or one of {', '.join(possible)}")
    if not config.compile:
        if config.attention == "xformers":
            check_xformers(source.family)
        return
    if config.low_vram:
        raise UserError("compile and low_vram are both on, but offloaded weights cannot be compiled; leave one out")
    if config.attention == "xformers":
        raise UserError("compile is on with attention xformers, which splits compiled code up; use --attention auto")
    try:
        if device.type == "cpu":
            get_cpp_compiler()
        elif triton_failure():
            raise ImportError(triton_failure())
        elif torch.cuda.get_device_capability(device)[0] < 7:
            raise RuntimeError(f"{torch.cuda.get_device_name(device)} is older than sm_70")
    except Exception as error:  # also Inductor's own types
        needed = "a C++ compiler" if device.type == "cpu" else "Triton on a GPU of sm_70 or later"
        raise UserError(
            f"compile is on, which needs {needed}: {first_line(error)}; install it or leave --compile out"
        ) from error
