"""What to do where a run needs more memory than there is: settings that the counted plan says would fit."""

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

SHARE_OF_DEVICE = 0.9  # of its memory, that a plan may take where an earlier one turned out too large
LORA_RANK = 16  # that is advised in place of full weights


def shortage(plan: MemoryPlan, config: TrainConfig, source: Source, prompts: int, device: torch.device) -> str:
    """One line that says what to do where `device` has less memory free than `plan` counts; empty where it has enough."""
    free = free_memory(device)
    if plan.total <= free:
        return ""
    there = f"are free on {device}" if device.type == "cuda" else "this machine has"
    advice = _advice(config, source, prompts, device, free)
    return f"warning: the plan is larger than the {_size(free)} that {there}; {advice}\n"


@contextmanager
def advised(
    config: TrainConfig, source: Source, prompts: int, device: torch.device, last_checkpoint: Callable[[], str]
) -> Iterator[None]:
    """Where no more memory is found within, a UserError says what to do; see `out_of_memory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, source, prompts, device, error, last_checkpoint()) from error


def out_of_memory(
    config: TrainConfig, source: Source, prompts: int, device: torch.device, error: Exception, last_checkpoint: str
) -> UserError:
    """What to tell the user of a run that found no more memory.

    Args:
        last_checkpoint: what is left of the run, such as "the last good checkpoint is runs/demo/checkpoint-250".
    """
    # The plan that failed was counted too low, or others share the device: one as large is no way out.
    failed = memory_plan(config, source, prompts, device).total
    advice = _advice(config, source, prompts, device, int(SHARE_OF_DEVICE * min(total_memory(device), failed)))
    what = textwrap.shorten(first_line(error), 150, placeholder=" ...")
    return UserError(
        f"out of memory on {device} ({what}); by the counted plan {advice}; {last_checkpoint}; changed settings need a "
        "run of their own in another --output_dir, for --resume_from_checkpoint latest continues with unchanged ones only"
    )


def _advice(config: TrainConfig, source: Source, prompts: int, device: torch.device, free: int) -> str:
    flags, counted = settings_that_fit(config, source, prompts, device, free)
    if flags is None:
        return f"no settings of this model fit, the smallest plan is {_size(counted)}"
    kind = "a LoRA, " if "--rank" in flags else ""
    return f"these settings would fit: {flags} ({kind}counted {_size(counted)})"


def settings_that_fit(
    config: TrainConfig, source: Source, prompts: int, device: torch.device, free: int
) -> tuple[str | None, int]:
    """What to change in `config`, whose own plan is too large, so that the plan takes at most `free` bytes.

    Returns:
        The flags that cost the user least, and the bytes of their plan; or None, and the bytes of the smallest plan.
    """

    def counted(changes: dict[str, Any]) -> int:
        return memory_plan(replace(config, **changes), source, prompts, device).total

    *larger, smallest_batch = _splits(config)
    smallest: float = inf
    for savings in _savings(config, source, device):
        try:
            least = counted(savings | smallest_batch)
        except UserError:  # the model has no layers for such a LoRA
            continue
        smallest = min(smallest, least)
        if least <= free:
            sizes = ((split, counted(savings | split)) for split in larger)
            split, total = next((each for each in sizes if each[1] <= free), (smallest_batch, least))
            return " ".join(as_flags(savings | split)), total
    return None, int(smallest)


def _savings(config: TrainConfig, source: Source, device: torch.device) -> list[dict[str, Any]]:
    """Settings that save memory, without those that `config` has, by what they cost the user: time, exactness, and last
    the full weights. A LoRA has few moments and shares its reference, so it is tried without the rest first."""
    can_checkpoint = source.family.denoiser_class._supports_gradient_checkpointing
    checkpointed = config.gradient_checkpointing or config.low_vram or not can_checkpoint
    checkpointing = {} if checkpointed else {"gradient_checkpointing": True}
    is_8bit = config.use_8bit_adam or importlib.util.find_spec("bitsandbytes") is None
    moments = checkpointing | ({} if is_8bit else {"use_8bit_adam": True})
    offload = moments | ({} if config.low_vram or device.type != "cuda" else {"low_vram": True})
    lora = {"rank": LORA_RANK}
    return [checkpointing, moments, offload, *(() if config.rank else (checkpointing | lora, offload | lora))]


def _splits(config: TrainConfig) -> list[dict[str, int]]:
    """Smaller batches, ever halved, that with accumulated gradients make the same step; first the batch as it is."""
    size, total = config.train_batch_size, config.total_batch_size
    halved = [size >> times for times in range(1, size.bit_length())]
    parts = [part for part in halved if total % part == 0]
    return [{}, *({"train_batch_size": part, "gradient_accumulation_steps": total // part} for part in parts)]


def _size(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
