"""Class-conditional DiT: in latent space, as published by its authors, or in pixel space, like the embedded demo."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from selfnpo.errors import UserError
from selfnpo.models.family import Config, Family
from selfnpo.options import SampleOptions


class ClassConditional(Family):
    name = "class-conditional"
    denoiser_class = DiTTransformer2DModel
    former_class_names = ("Transformer2DModel",)  # an old class for many models, distinguished by norm_type
    pipeline_name = "DiTPipeline"
    component = "transformer"
    guidance_scale = 4.0
    architecture = "dit"

    def matches(self, config: Config) -> bool:
        return config.get("norm_type", "ada_norm_zero") == "ada_norm_zero"

    def check(self, config: Config) -> None:
        """Accept `out_channels` twice `in_channels`: the extra half is a learned variance, which DDIM does not use."""

    def sample_shape(self, config: Config, scale: int, options: SampleOptions) -> tuple[int, ...]:
        side = config["sample_size"] * scale
        if options.size(side, side) != (side, side):
            raise UserError(
                f"resolution is {options.size(side, side)}; expected {side}, the only size that this DiT supports"
            )
        return config["in_channels"], config["sample_size"], config["sample_size"]

    def classes(self, config: Config) -> dict[str, Tensor]:
        return {"class_labels": torch.arange(config["num_embeds_ada_norm"] + 1)}

    def call(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        return super().call(denoiser, sample, timesteps, conditions)[:, : sample.shape[1]]
