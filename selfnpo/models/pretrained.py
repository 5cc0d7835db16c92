"""Pretrained diffusion models: a denoiser, its scheduler and its conditions.

Conditions are encoded once. Everywhere else in the project, a condition is a row number.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn

from selfnpo.models.family import Family
from selfnpo.models.source import Source


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Move `tensor` to `device` through pinned memory, so that the host does not wait for the copy."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Conditions:
    """Arguments of a denoiser: `rows` `[n, ...]` per sample, `constants` (see `Family.constants`) for all.

    Training draws from rows 0 to count - 1. Row `count` is the null condition. Any rows after it are for pictures.
    """

    count: int
    rows: Mapping[str, Tensor]
    constants: Mapping[str, Any]

    def select(self, index: Tensor, device: torch.device) -> dict[str, Any]:
        """The arguments on `device` for the conditions `index` `[B]`, which must be on the CPU if the rows are."""
        found: dict[str, Any] = {}
        for name, rows in self.rows.items():
            if rows.device == device:
                found[name] = rows[move(index, device)]
            else:
                found[name] = move(rows[index], device)
        for name, value in self.constants.items():
            found[name] = value.expand(len(index), *value.shape[1:]) if isinstance(value, Tensor) else value
        return found


@dataclass(frozen=True)
class PretrainedModel:
    family: Family
    denoiser: ModelMixin
    scheduler: SchedulerMixin
    conditions: Conditions
    sample_shape: tuple[int, ...]  # of one sample: (channels, height, width); (frames, channels, height, width) for videos
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32  # precision of the network's computation
    source: Source | None = None  # the other parts of the model; None for models that were not loaded from files
    padding: int = 0  # see `Family.padding`

    @property
    def num_conditions(self) -> int:
        return self.conditions.count

    @property
    def null_condition(self) -> int:
        return self.conditions.count

    def asked(self, further: int) -> Tensor:
        """Conditions for pictures: the `further` ones after the null condition, or the training conditions if that is 0."""
        count = self.conditions.count
        return torch.arange(count + 1, count + 1 + further) if further else torch.arange(count)

    def move(self, tensor: Tensor) -> Tensor:
        """Move a tensor from the host to the device."""
        return move(tensor, self.device)

    @property
    def index_device(self) -> torch.device:
        """Device for condition indices: the model's, unless the encoded prompts are on the host."""
        return self.device if all(rows.device == self.device for rows in self.conditions.rows.values()) else CPU

    def arguments(self, sample: Tensor, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Arguments for `Family.call`; see `predict`."""
        conditions = self.conditions.select(condition, self.device)
        return sample.to(self.dtype), self.move(timesteps), conditions

    def arithmetic(self, denoiser: nn.Module) -> AbstractContextManager:
        """Autocast for a denoiser whose weights have a higher precision than its computation."""
        kept_higher = self.dtype != torch.float32 and denoiser.dtype != self.dtype
        return torch.autocast(self.device.type, self.dtype) if kept_higher else nullcontext()

    def predict(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """model_output of any denoiser with this architecture, in the network's precision.

        Args:
            sample: `[B, ...]` on the device, float32.
            timesteps, condition: `[B]`, on the CPU or the device. `condition` must be on the CPU if the prompts are.
        """
        arguments = self.arguments(sample, timesteps, condition)
        with self.arithmetic(denoiser):
            return self.family.call(denoiser, *arguments)

    def predict_guided(
        self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, condition: Tensor, guidance_scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """(cond, uncond) for `guided_step`. Evaluates only what the guidance scale needs: one branch at 0 and 1."""
        null = torch.full_like(condition, self.null_condition)
        if guidance_scale in (0, 1):
            return self.predict(denoiser, sample, timesteps, condition if guidance_scale else null), None
        both = self.predict(denoiser, torch.cat((sample,) * 2), torch.cat((timesteps,) * 2), torch.cat((null, condition)))
        uncond, cond = both.chunk(2)
        return cond, uncond
