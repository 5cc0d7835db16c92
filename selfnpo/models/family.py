"""What a family of diffusion models is: the few things in which Stable Diffusion, CogVideoX and a plain UNet differ.

A family is one file of this package with one subclass. It says how a denoiser is called, which shape its samples have, what
its conditions are and where a LoRA goes; nothing else in the project knows a family's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers.utils import logging

from selfnpo.errors import UserError
from selfnpo.options import SampleOptions

Config = dict[str, Any]  # config.json of a denoiser


class Family(ABC):
    """Stateless; `denoiser` is always a model of `denoiser_class`, `config` its configuration."""

    name: ClassVar[str]
    denoiser_class: ClassVar[type[ModelMixin]]
    former_class_names: ClassVar[tuple[str, ...]] = ()  # of the denoiser, in configurations that were published long ago
    pipeline_name: ClassVar[str]  # of a class of diffusers; imported when it is needed, for it brings transformers along
    component: ClassVar[str]  # the denoiser's name in the pipeline
    sample_options: ClassVar[tuple[str, ...]] = ("resolution", "height", "width")  # which of SampleOptions it reads
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    text_components: ClassVar[tuple[str, ...]] = ()  # of the pipeline, to encode prompts with; empty where none are taken
    null_is_empty_prompt: ClassVar[bool] = (
        True  # where prompts are taken, whether the null condition is always the prompt ""
    )
    repeated_blocks: ClassVar[tuple[str, ...]] = ("ResnetBlock2D", "BasicTransformerBlock")  # classes, to compile by
    has_xformers: ClassVar[bool] = True  # whether its attention has an xformers form in diffusers
    guidance_scale: ClassVar[float] = 7.5  # of pictures
    base_model_version: ClassVar[str] = (
        ""  # `ss_base_model_version` of kohya's LoRA files; empty: ComfyUI knows no such LoRA
    )
    architecture: ClassVar[str]  # of https://github.com/Stability-AI/ModelSpec
    pipeline_tag: ClassVar[str] = ""  # of https://huggingface.co/tasks; empty where none is right
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # what a preset changes for this family

    def matches(self, config: Config) -> bool:
        """Whether a denoiser of `denoiser_class` with this configuration belongs to the family."""
        return True

    def check(self, config: Config) -> None:
        """Raise a UserError for a variant of the architecture that takes more inputs than this family gives."""
        if config["in_channels"] != config["out_channels"]:
            raise UserError(
                f"the denoiser takes {config['in_channels']} channels and returns {config['out_channels']}: it is a variant "
                "for inpainting, editing or image-to-video; train on the text-to-image or text-to-video model it came from"
            )

    def check_sample_options(self, options: SampleOptions) -> None:
        """Raise a UserError for an option that models of this family do not have."""
        for field in fields(SampleOptions):
            value = getattr(options, field.name)
            if value != field.default and field.name not in self.sample_options:
                raise UserError(
                    f"{field.name} is {value}, which {self.name} models do not have; leave it out (expected one of "
                    f"{', '.join(self.sample_options)})"
                )
        if options.resolution and options.height and options.width:
            raise UserError(f"resolution is {options.resolution}, but height and width are given too; leave resolution out")

    @abstractmethod
    def sample_shape(self, config: Config, scale: int, options: SampleOptions) -> tuple[int, ...]:
        """The shape of one sample without its batch; `scale` is the number of pixels per latent in each direction.

        Raises:
            UserError: a size that the family cannot have.
        """

    def padding(self, config: Config, options: SampleOptions) -> int:
        """How many of a video sample's first frames are there for the denoiser alone, and are not decoded."""
        return 0

    def pixels(self, sample_shape: tuple[int, ...], scale: int) -> tuple[int, int]:
        """(height, width) in pixels of a sample."""
        return sample_shape[-2] * scale, sample_shape[-1] * scale

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Shapes of the rows that `encode` returns, without the number of prompts."""
        return {}

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # transformers proposes torchvision, for image processors that are not used here
        try:
            return getattr(diffusers, self.pipeline_name)
        finally:
            logging.set_verbosity(verbosity)

    @property
    def takes_prompts(self) -> bool:
        return bool(self.text_components)

    def max_tokens(self, tokenizer: Any, config: Config) -> int:
        """Tokens of a prompt, special ones included, beyond which it is cut."""
        return tokenizer.model_max_length

    def encode(self, pipeline: DiffusionPipeline, config: Config, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Arguments of the denoiser, one row per prompt: `[n, ...]`; only where `takes_prompts`."""
        raise NotImplementedError

    def encode_null(self, pipeline: DiffusionPipeline, config: Config) -> dict[str, Tensor]:
        """The same for the null condition, as the family's pipeline makes it: `[1, ...]`."""
        return self.encode(pipeline, config, [""])

    def classes(self, config: Config) -> dict[str, Tensor]:
        """Arguments of the denoiser, one row per class the last for the null condition; where prompts are not taken."""
        return {}

    def constants(
        self, config: Config, sample_shape: tuple[int, ...], scale: int, options: SampleOptions
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Arguments of the denoiser that are the same for all samples: tensors `[1, ...]` to repeat per sample, or tuples of
        tensors to hand over as they are."""
        return {}

    def call(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        """model_output `[B, ...]`, in the shape of `sample`."""
        return denoiser(sample, timesteps, return_dict=False, **conditions)[0]


def image_size(config: Config, scale: int, options: SampleOptions) -> tuple[int, int]:
    """(height, width) in pixels: what `options` say, or what the model was trained for.

    Raises:
        UserError: neither says it.
    """
    trained = config["sample_size"] or 0
    height, width = trained if isinstance(trained, (tuple, list)) else (trained, trained)
    size = options.size(height * scale, width * scale)
    if not all(size):
        raise UserError("the model's configuration names no sample_size; pass --resolution")
    return size


def multiple(name: str, value: int, of: int) -> None:
    """Raises: UserError unless `value` is a positive multiple."""
    if value < of or value % of:
        near = max(of, round(value / of) * of)
        raise UserError(f"{name} is {value}; expected a multiple of {of} for this model, such as {near}")
