"""Stable Diffusion 1.x and 2.x and their fine-tunes: `UNet2DConditionModel` with one text encoder."""

from collections.abc import Sequence
from typing import ClassVar

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from selfnpo.errors import UserError
from selfnpo.models.family import Config, Family, check_size, image_size
from selfnpo.options import SampleOptions

# The released script's values. The project's own defaults were only measured on small models.
RELEASED = {
    "max_train_steps": 1000,
    "train_batch_size": 20,
    "learning_rate": 1e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}

TEXT_WIDTH_2 = 1024  # embedding width of Stable Diffusion 2's text encoder


class StableDiffusion(Family):
    name = "stable-diffusion"
    denoiser_class = UNet2DConditionModel
    pipeline_name = "StableDiffusionPipeline"
    component = "unet"
    text_components = ("tokenizer", "text_encoder")
    base_model_version = "sd_v1"
    architecture = "stable-diffusion-v1"
    pipeline_tag = "text-to-image"
    presets: ClassVar = {"default": RELEASED}

    def matches(self, config: Config) -> bool:
        return config.get("addition_embed_type") is None and config.get("cross_attention_dim") != TEXT_WIDTH_2

    def check(self, config: Config) -> None:
        super().check(config)
        for name in ("class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type"):
            if config.get(name) is not None:
                raise UserError(
                    f"the UNet's {name} is {config[name]}: it is a variant that needs more inputs than a prompt (unCLIP, a "
                    "guidance-distilled or an IP-Adapter model); train on the plain text-to-image model it is based on"
                )

    def sample_shape(self, config: Config, scale: int, options: SampleOptions) -> tuple[int, ...]:
        height, width = image_size(config, scale, options)
        check_size(options, (height, width), scale)
        return config["in_channels"], height // scale, width // scale

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (77, config["cross_attention_dim"])}

    def encode(self, pipeline: DiffusionPipeline, config: Config, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": rows}


class StableDiffusion2(StableDiffusion):
    name = "stable-diffusion-2"
    base_model_version = "sd_v2"
    architecture = "stable-diffusion-v2-768-v"

    def matches(self, config: Config) -> bool:
        return config.get("addition_embed_type") is None and config.get("cross_attention_dim") == TEXT_WIDTH_2
