"""What a training run will take in memory, counted on the meta device before anything is loaded.

Weights, gradients, moments and samples are exact. Activations are estimated: what the student's forward pass keeps for its
backward pass, with attention as flash kernels do it. What libraries allocate beside them is not counted.
"""

import importlib.util
import os
import sys
import textwrap
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from selfnpo.adapters import STUDENT, add_lora, lora_config, lora_layers, switch
from selfnpo.cli import as_flags
from selfnpo.config import TrainConfig, dtype_of
from selfnpo.errors import UserError, first_line
from selfnpo.models import SampleOptions, Source
from selfnpo.optimizer import moment_bytes
from selfnpo.student import checkpoint_gradients, is_split

SHARE_OF_DEVICE = 0.9  # of its memory, that a plan may take where an earlier one turned out too large
LORA_RANK = 16  # that is advised in place of full weights


@dataclass(frozen=True)
class MemoryPlan:
    parameters: int  # of the denoiser
    trainable: int
    rows: dict[str, int]  # what is on the training device -> bytes

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    def __str__(self) -> str:
        unit, name = (1 << 30, "GiB") if self.total >= 1 << 30 else (1 << 20, "MiB")
        rows = {what: size for what, size in self.rows.items() if size} | {"together": self.total}
        title = f"memory plan: {self.parameters:,} parameters, {self.trainable:,} trained"
        return "\n".join((title, *(f"  {what:<44} {size / unit:8.2f} {name}" for what, size in rows.items())))


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine where the CPU trains."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if not hasattr(os, "sysconf"):  # on Windows; unknown is taken for enough
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes that a run can have; of the machine's memory all, for what others leave unused there is used as a cache."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total_memory(device)


def shortage(plan: MemoryPlan, config: TrainConfig, source: Source, prompts: int, device: torch.device) -> str:
    """One line that says what to do where `device` has less memory free than `plan` counts; empty where it has enough."""
    free = free_memory(device)
    if plan.total <= free:
        return ""
    there = f"are free on {device}" if device.type == "cuda" else "this machine has"
    advice = _advice(config, source, prompts, device, free)
    return f"warning: the plan is larger than the {_size(free)} that {there}; {advice}\n"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on a GPU or on the CPU, or Python found no more memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = (
        "can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


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


def memory_plan(config: TrainConfig, source: Source, prompts: int, device: torch.device) -> MemoryPlan:
    """What `config` needs on `device` to train with that many prompts.

    Raises:
        UserError: a size that the model cannot have, or a LoRA that does not fit its layers.
    """
    dtype = dtype_of(config.mixed_precision)
    model = nn.Module.to(source.empty_denoiser(), dtype)
    shape = source.family.sample_shape(source.config, source.scale, config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    trainable = make_trainable(config, source, model)
    trained = sum(parameter.numel() for parameter in trainable)
    if config.rank:
        rows = {"base, shared by student and reference": weights * dtype.itemsize, "adapters": 4 * trained}
        rows["average of the adapters"] = 4 * trained if config.reference_decay < 1 else 0
    else:
        rows = {"student": 4 * weights}
        rows |= _reference(config, weights, dtype, device)
    split = is_split(config, dtype)
    prompt_size = prompts * sum(map(prod, source.family.condition_shapes(source.config).values())) * dtype.itemsize
    on_device = not (config.low_vram and device.type == "cuda")
    samples = (config.pool_size if config.rollout == "pool" else 1) * config.total_batch_size
    rows |= {
        "gradients": (dtype.itemsize if split else 4) * trained,
        "their sums, float32": 4 * trained if split and config.gradient_accumulation_steps > 1 else 0,
        "AdamW's two moments": sum(moment_bytes(config, parameter) for parameter in trainable),
        f"prompts ({prompts} encoded)": prompt_size if on_device else 0,
        f"samples under way ({samples})": 4 * samples * prod(shape),
        f"activations ({config.train_batch_size} samples, estimated)": activations(config, source, model, shape),
    }
    return MemoryPlan(weights, trained, rows)


def make_trainable(config: TrainConfig, source: Source, model: ModelMixin) -> list[nn.Parameter]:
    """Turn a model on the meta device into the student that `config` asks for; returns what is trained.

    Raises:
        UserError: a LoRA that does not fit its layers.
    """
    if config.rank:
        trainable = [*add_lora(model, lora_config(config, source.family), STUDENT).values()]
        switch(lora_layers(model).values(), STUDENT)
    else:
        trainable = [*model.requires_grad_(True).parameters()]
    checkpoint_gradients(config, model)
    return trainable


def _reference(config: TrainConfig, weights: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        kept = {"base, to measure the distance from": 4 * weights}
        if config.reference_decay < 1:
            return kept | {"reference, an average": 4 * weights}
        return kept | {"reference, frozen": 0 if dtype == torch.float32 else dtype.itemsize * weights}
    if config.low_vram:
        return {}
    return {"reference": (4 if config.reference_decay < 1 else dtype.itemsize) * weights}


def activations(config: TrainConfig, source: Source, model: ModelMixin, shape: tuple[int, ...]) -> int:
    """Bytes that one forward pass of `model`, which lies on the meta device, keeps for its backward pass."""
    kept: dict[int, int] = {}
    weights = {id(parameter) for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []  # so that no address is given out twice
    with (
        patch.object(functional, "scaled_dot_product_attention", lambda q, k, v, **options: _Flash.apply(q, k, v)),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        call_on_meta(source, model, shape, config.train_batch_size, config)
    return sum(kept.values())


def call_on_meta(source: Source, model: ModelMixin, shape: tuple[int, ...], batch_size: int, sizes: SampleOptions) -> Tensor:
    """The model's output, without values, for a batch of samples and conditions of the right shapes."""
    family, config = source.family, source.config

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=model.dtype, device="meta")

    conditions = {name: empty(batch_size, *row) for name, row in family.condition_shapes(config).items()}
    conditions |= {name: rows[:1].expand(batch_size).to("meta") for name, rows in family.classes(config).items()}
    for name, value in family.constants(config, shape, source.scale, sizes).items():
        is_tensor = isinstance(value, Tensor)
        conditions[name] = value.expand(batch_size, -1).to("meta") if is_tensor else tuple(each.to("meta") for each in value)
    return family.call(model, empty(batch_size, *shape), torch.zeros(batch_size, device="meta"), conditions)


class _Flash(torch.autograd.Function):
    """Attention that keeps its inputs and its output, and not the attention matrix."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output
