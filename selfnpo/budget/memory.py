"""The memory that a training run needs, counted on the meta device before anything is loaded.

Weights, gradients, moments and samples are exact. Activations are an estimate of what the student's forward pass keeps for
its backward pass, assuming flash attention. Other allocations by libraries are not counted.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from selfnpo.budget.meta import activations, make_trainable
from selfnpo.config import TrainConfig
from selfnpo.device import dtype_of
from selfnpo.models import Source
from selfnpo.training.optimizer import moment_bytes
from selfnpo.training.student import is_split


@dataclass(frozen=True)
class MemoryPlan:
    parameters: int  # of the denoiser
    trainable: int
    rows: dict[str, int]  # description -> bytes on the training device

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    def __str__(self) -> str:
        unit, name = (1 << 30, "GiB") if self.total >= 1 << 30 else (1 << 20, "MiB")
        rows = {what: size for what, size in self.rows.items() if size} | {"together": self.total}
        title = f"memory plan: {self.parameters:,} parameters, {self.trainable:,} trained"
        return "\n".join((title, *(f"  {what:<44} {size / unit:8.2f} {name}" for what, size in rows.items())))


def memory_plan(config: TrainConfig, source: Source, prompts: int, device: torch.device) -> MemoryPlan:
    """The memory that `config` needs on `device` to train with this many prompts.

    Raises:
        UserError: the model does not support the size, or a LoRA does not fit its layers.
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


def _reference(config: TrainConfig, weights: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        kept = {"base, to measure the distance from": 4 * weights}
        if config.reference_decay < 1:
            return kept | {"reference, an average": 4 * weights}
        return kept | {"reference, frozen": 0 if dtype == torch.float32 else dtype.itemsize * weights}
    if config.low_vram:
        return {}
    return {"reference": (4 if config.reference_decay < 1 else dtype.itemsize) * weights}
