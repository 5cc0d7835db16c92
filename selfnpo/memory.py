"""What a training run will take in memory, counted on the meta device before anything is loaded.

Weights, gradients, moments and samples are exact. Activations are estimated: what the student's forward pass keeps for its
backward pass, with attention as flash kernels do it. What libraries allocate beside them is not counted.
"""

from dataclasses import dataclass
from math import prod
from unittest.mock import patch

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from selfnpo.config import TrainConfig, dtype_of
from selfnpo.models import SampleOptions, Source
from selfnpo.optimizer import moment_bytes
from selfnpo.student import STUDENT, add_lora, checkpoint_gradients, lora_config, lora_layers, switch


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


def shortage(plan: MemoryPlan, device: torch.device) -> str:
    """What to do where `device` has less memory free than `plan` counts; empty where it has enough."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else plan.total
    if plan.total <= free:
        return ""
    return (
        f"warning: the plan is larger than the {free / (1 << 30):.1f} GiB that are free on {device}; try "
        "--gradient_checkpointing, a smaller --train_batch_size with --gradient_accumulation_steps, "
        "--rank 16 for a LoRA, --use_8bit_adam, or --low_vram\n"
    )


def memory_plan(config: TrainConfig, source: Source, prompts: int, device: torch.device) -> MemoryPlan:
    """What `config` needs on `device` to train with that many prompts.

    Raises:
        UserError: a size that the model cannot have, or a LoRA that does not fit its layers.
    """
    dtype = dtype_of(config.mixed_precision)
    model = nn.Module.to(source.empty_denoiser(), dtype)
    shape = source.family.sample_shape(source.config, source.scale, config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if config.rank:
        trainable = [*add_lora(model, lora_config(config, source.family), STUDENT).values()]
        switch(lora_layers(model).values(), STUDENT)
        trained = sum(parameter.numel() for parameter in trainable)
        rows = {"base, shared by student and reference": weights * dtype.itemsize, "adapters": 4 * trained}
        rows["average of the adapters"] = 4 * trained if config.reference_decay < 1 else 0
    else:
        trainable, trained = [*model.requires_grad_(True).parameters()], weights
        rows = {"student, float32": 4 * weights}
        rows |= _reference(config, weights, dtype, device)
    checkpoint_gradients(config, model)
    prompt_size = prompts * sum(map(prod, source.family.condition_shapes(source.config).values())) * dtype.itemsize
    on_device = not (config.low_vram and device.type == "cuda")
    samples = (config.pool_size if config.rollout == "pool" else 1) * config.total_batch_size
    rows |= {
        "gradients": 4 * trained,
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
            return kept | {"reference, an average in float32": 4 * weights}
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
