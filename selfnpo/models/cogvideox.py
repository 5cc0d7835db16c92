"""CogVideoX text-to-video: a transformer on latents of `[frames, channels, height, width]`, v-prediction."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from torch import Tensor, nn

from selfnpo.errors import UserError
from selfnpo.models.family import Config, Family, check_size
from selfnpo.options import SampleOptions

FRAMES_PER_LATENT = 4  # the VAE's temporal compression


class CogVideoX(Family):
    name = "cogvideox"
    denoiser_class = CogVideoXTransformer3DModel
    pipeline_name = "CogVideoXPipeline"
    component = "transformer"
    sample_options = (*Family.sample_options, "num_frames")
    text_components = ("tokenizer", "text_encoder")
    guidance_scale = 6.0
    repeated_blocks = ("CogVideoXBlock",)
    has_xformers = False  # diffusers' xformers processor does not support its joint attention with the prompt
    architecture = "cogvideox"
    pipeline_tag = "text-to-video"
    presets: ClassVar = {
        "default": {
            "max_train_steps": 1000,
            "train_batch_size": 1,
            "learning_rate": 1e-6,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "gradient_checkpointing": True,
        },
        "paper": {"train_batch_size": 1, "gradient_checkpointing": True},
        "released": {"train_batch_size": 1, "gradient_checkpointing": True},
    }

    def sample_shape(self, config: Config, scale: int, options: SampleOptions) -> tuple[int, ...]:
        height, width = options.size(config["sample_height"] * scale, config["sample_width"] * scale)
        check_size(options, (height, width), scale * config["patch_size"])
        frames = options.num_frames or config["sample_frames"]
        if frames < 1 or (frames - 1) % FRAMES_PER_LATENT:
            near = max(0, round((frames - 1) / FRAMES_PER_LATENT)) * FRAMES_PER_LATENT + 1
            raise UserError(f"num_frames is {frames}; expected a multiple of {FRAMES_PER_LATENT} plus 1, such as {near}")
        latent_frames = self._latent_frames(config, options) + self.padding(config, options)
        return latent_frames, config["in_channels"], height // scale, width // scale

    def _latent_frames(self, config: Config, options: SampleOptions) -> int:
        return ((options.num_frames or config["sample_frames"]) - 1) // FRAMES_PER_LATENT + 1

    def padding(self, config: Config, options: SampleOptions) -> int:
        return -self._latent_frames(config, options) % (config.get("patch_size_t") or 1)  # only 1.5 has patch_size_t

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (config["max_text_seq_length"], config["text_embed_dim"])}

    def max_tokens(self, tokenizer: Any, config: Config) -> int:
        return config["max_text_seq_length"]

    def encode(self, pipeline: DiffusionPipeline, config: Config, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=config["max_text_seq_length"],
            device=pipeline.text_encoder.device,
        )
        return {"encoder_hidden_states": rows}

    def constants(
        self, config: Config, sample_shape: tuple[int, ...], scale: int, options: SampleOptions
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        if not config["use_rotary_positional_embeddings"]:
            return {}
        # The pipeline's own method, called with the only two attributes that it needs.
        pipeline = SimpleNamespace(
            vae_scale_factor_spatial=scale,
            transformer=SimpleNamespace(config=SimpleNamespace(**{"patch_size_t": None} | config)),
        )
        prepare = self.pipeline_class._prepare_rotary_positional_embeddings
        height, width = self.pixels(sample_shape, scale)
        return {"image_rotary_emb": prepare(pipeline, height, width, sample_shape[0], torch.device("cpu"))}

    def call(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        return denoiser(hidden_states=sample, timestep=timesteps, return_dict=False, **conditions)[0]
