"""Advice for a run that needs too much memory: settings that would fit according to the memory plan."""

import importlib.util
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from typing import Any

import torch

from selfnpo.budget.memory import MemoryPlan, memory_plan
from selfnpo.cli import as_flags
from selfnpo.config import TrainConfig
from selfnpo.device import free_memory, total_memory
from selfnpo.errors import UserError, first_line, is_out_of_memory
from selfnpo.models import Source
from selfnpo.progress import lasting

SHARE_OF_DEVICE = 0.9  # of its memory, for a new plan after running out of memory
LORA_RANK = 16  # suggested instead of full weights


def planned(config: TrainConfig, source: Source, prompts: int, device: torch.device) -> str:
    """The memory plan as text, with a line of advice if it does not fit."""
    with lasting("planning memory"):
        plan = memory_plan(config, source, prompts, device)
    return f"{plan}\n{shortage(plan, config, source, prompts, device)}"


def shortage(plan: MemoryPlan, config: TrainConfig, source: Source, prompts: int, device: torch.device) -> str:
    """A line of advice if `device` has less free memory than `plan` needs; empty if it has enough."""
    free = free_memory(device)
    if plan.total <= free:
        return ""
    there = f"are free on {device}" if device.type == "cuda" else "this machine has"
    advice = _advice(config, source, prompts, device, free)
    return f"warning: the plan needs more than the {_size(free)} that {there}; {advice}\n"


@contextmanager
def advised(
    config: TrainConfig, source: Source, prompts: int, device: torch.device, last_checkpoint: Callable[[], str]
) -> Iterator[None]:
    """Turn running out of memory in the block into a UserError with advice; see `out_of_memory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, source, prompts, device, error, last_checkpoint()) from error


def out_of_memory(
    config: TrainConfig, source: Source, prompts: int, device: torch.device, error: Exception, last_checkpoint: str
) -> UserError:
    """The error for a run that ran out of memory.

    Args:
        last_checkpoint: what was saved, such as "the last good checkpoint is runs/demo/checkpoint-250".
    """
    # The failed plan was an underestimate, or others use the device too. So advise only smaller plans.
    failed = memory_plan(config, source, prompts, device).total
    advice = _advice(config, source, prompts, device, int(SHARE_OF_DEVICE * min(total_memory(device), failed)))
    what = textwrap.shorten(first_line(error), 150, placeholder=" ...")
    return UserError(
        f"out of memory on {device} ({what}); by the memory plan {advice}; {last_checkpoint}; use another --output_dir if "
        "you change settings, because --resume_from_checkpoint latest needs the same ones"
    )


def _advice(config: TrainConfig, source: Source, prompts: int, device: torch.device, free: int) -> str:
    flags, counted = settings_that_fit(config, source, prompts, device, free)
    if flags is None:
        return f"no settings for this model fit (the smallest plan needs {_size(counted)})"
    kind = "a LoRA, " if "--rank" in flags else ""
    return f"these settings would fit: {flags} ({kind}planned {_size(counted)})"


def settings_that_fit(
    config: TrainConfig, source: Source, prompts: int, device: torch.device, free: int
) -> tuple[str | None, int]:
    """Find changes to `config`, whose own plan is too large, with which the plan needs at most `free` bytes.

    Returns:
        The flags that cost the user least, and the bytes of their plan. If nothing fits: None, and the bytes of the smallest
        plan.
    """

    def counted(changes: dict[str, Any]) -> int:
        return memory_plan(replace(config, **changes), source, prompts, device).total

    *larger, smallest_batch = _splits(config)
    smallest: float = inf
    for savings in _savings(config, source, device):
        try:
            least = counted(savings | smallest_batch)
        except UserError:  # such a LoRA does not fit the model's layers
            continue
        smallest = min(smallest, least)
        if least <= free:
            sizes = ((split, counted(savings | split)) for split in larger)
            split, total = next((each for each in sizes if each[1] <= free), (smallest_batch, least))
            return " ".join(as_flags(savings | split)), total
    return None, int(smallest)


def _savings(config: TrainConfig, source: Source, device: torch.device) -> list[dict[str, Any]]:
    """Settings that save memory and that `config` does not use yet, ordered by their cost to the user: first time, then
    precision, last full weights. A LoRA needs few moments and shares its reference, so it is tried alone first."""
    can_checkpoint = source.family.denoiser_class._supports_gradient_checkpointing
    checkpointed = config.gradient_checkpointing or config.low_vram or not can_checkpoint
    checkpointing = {} if checkpointed else {"gradient_checkpointing": True}
    is_8bit = config.use_8bit_adam or importlib.util.find_spec("bitsandbytes") is None
    moments = checkpointing | ({} if is_8bit else {"use_8bit_adam": True})
    offload = moments | ({} if config.low_vram or device.type != "cuda" else {"low_vram": True})
    lora = {"rank": LORA_RANK}
    return [checkpointing, moments, offload, *(() if config.rank else (checkpointing | lora, offload | lora))]


def _splits(config: TrainConfig) -> list[dict[str, int]]:
    """First no change, then smaller and smaller batches with gradient accumulation; the step stays the same."""
    size, total = config.train_batch_size, config.total_batch_size
    halved = [size >> times for times in range(1, size.bit_length())]
    parts = [part for part in halved if total % part == 0]
    return [{}, *({"train_batch_size": part, "gradient_accumulation_steps": total // part} for part in parts)]


def _size(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
