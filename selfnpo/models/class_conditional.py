"""Class-conditional DiT, in latent space as its authors published it, or in pixel space as the embedded demo."""

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
    former_class_names = ("Transformer2DModel",)  # which was many models in one, told apart by norm_type
    pipeline_name = "DiTPipeline"
    component = "transformer"
    guidance_scale = 4.0
    architecture = "dit"

    def matches(self, config: Config) -> bool:
        return config.get("norm_type", "ada_norm_zero") == "ada_norm_zero"

    def check(self, config: Config) -> None:
        """`out_channels` may be twice `in_channels`: a learned variance, which no deterministic sampler reads."""

    def sample_shape(self, config: Config, scale: int, options: SampleOptions) -> tuple[int, ...]:
        side = config["sample_size"] * scale
        if options.size(side, side) != (side, side):
            raise UserError(f"resolution is {options.size(side, side)}; a DiT has positions for its own size alone, {side}")
        return config["in_channels"], config["sample_size"], config["sample_size"]

    def classes(self, config: Config) -> dict[str, Tensor]:
        return {"class_labels": torch.arange(config["num_embeds_ada_norm"] + 1)}

    def call(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        return super().call(denoiser, sample, timesteps, conditions)[:, : sample.shape[1]]
