"""Stable Diffusion XL: two text encoders, and micro-conditioning on image sizes."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from selfnpo.errors import UserError
from selfnpo.models.family import Config, Family
from selfnpo.models.stable_diffusion import RELEASED, StableDiffusion
from selfnpo.options import SampleOptions

# The released SDXL script's values.
RELEASED_XL = RELEASED | {
    "train_batch_size": 10,
    "learning_rate": 1e-7,
    "adam_weight_decay": 0.0,
    "gradient_checkpointing": True,
}


class StableDiffusionXL(StableDiffusion):
    name = "stable-diffusion-xl"
    pipeline_name = "StableDiffusionXLPipeline"
    sample_options = (*Family.sample_options, "original_size", "crops_coords_top_left", "target_size")
    null_is_empty_prompt = False  # it is zeros in the published configuration
    text_components = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    base_model_version = "sdxl_base_v1-0"
    guidance_scale = 5.0
    architecture = "stable-diffusion-xl-v1-base"
    presets: ClassVar = {
        "default": RELEASED_XL,
        "paper": RELEASED_XL,
        "released": RELEASED_XL | {"rollout_guidance_scale": -4.0},  # the script's w = -5
    }

    def matches(self, config: Config) -> bool:
        return config.get("addition_embed_type") == "text_time"

    def check(self, config: Config) -> None:
        super().check(config)
        if config["projection_class_embeddings_input_dim"] == 2560:
            raise UserError("the UNet is SDXL's refiner, which needs an aesthetic score; train on the SDXL base model")

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return super().condition_shapes(config) | {"text_embeds": (pooled,)}

    def encode(self, pipeline: DiffusionPipeline, config: Config, prompts: Sequence[str]) -> dict[str, Tensor]:
        device = pipeline.text_encoder_2.device
        rows, _, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": rows, "text_embeds": pooled}

    def encode_null(self, pipeline: DiffusionPipeline, config: Config) -> dict[str, Tensor]:
        rows = self.encode(pipeline, config, [""])
        if pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in rows.items()}
        return rows

    def constants(
        self, config: Config, sample_shape: tuple[int, ...], scale: int, options: SampleOptions
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        sampled = self.pixels(sample_shape, scale)
        sizes = (options.original_size or sampled, options.crops_coords_top_left, options.target_size or sampled)
        return {"time_ids": torch.tensor([[float(value) for size in sizes for value in size]])}

    def call(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        rows = conditions["encoder_hidden_states"]
        return denoiser(sample, timesteps, encoder_hidden_states=rows, added_cond_kwargs=added, return_dict=False)[0]
