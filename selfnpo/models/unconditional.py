"""Unconditional models: `UNet2DModel` in pixel space, such as DDPM. There are no prompts or classes."""

from typing import ClassVar

from diffusers import UNet2DModel

from selfnpo.errors import UserError
from selfnpo.models.family import Config, Family, check_size, image_size
from selfnpo.options import SampleOptions


class Unconditional(Family):
    name = "unconditional"
    denoiser_class = UNet2DModel
    pipeline_name = "DDPMPipeline"
    component = "unet"
    guidance_scale = 2.0
    architecture = "ddpm"
    pipeline_tag = "unconditional-image-generation"
    # These networks have little attention, so a LoRA also adapts convolutions.
    lora_targets = (*Family.lora_targets, "conv1", "conv2")
    presets: ClassVar = {"default": {"train_batch_size": 32, "learning_rate": 1e-6, "max_train_steps": 1000}}

    def check(self, config: Config) -> None:
        super().check(config)
        if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
            raise UserError(
                "the UNet2DModel needs class labels, which only DiT models may use here; train on an unconditional model"
            )

    def sample_shape(self, config: Config, scale: int, options: SampleOptions) -> tuple[int, ...]:
        height, width = image_size(config, scale, options)
        step = scale * 2 ** (len(config["block_out_channels"]) - 1)  # every level halves the size, without padding
        check_size(options, (height, width), step)
        return config["in_channels"], height // scale, width // scale
