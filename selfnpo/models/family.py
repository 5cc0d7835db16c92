"""The interface of a model family: the few things in which Stable Diffusion, CogVideoX and a plain UNet differ.

A family is one file in this package with one subclass. It defines how a denoiser is called, the shape of its samples, its
conditions, and the layers that a LoRA adapts. Nothing else in the project knows a family by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from selfnpo.errors import UserError
from selfnpo.models.foreign import silent
from selfnpo.options import SampleOptions

Config = dict[str, Any]  # config.json of a denoiser


class Family(ABC):
    """Stateless. `denoiser` is always a model of `denoiser_class`, and `config` its configuration."""

    name: ClassVar[str]
    denoiser_class: ClassVar[type[ModelMixin]]
    former_class_names: ClassVar[tuple[str, ...]] = ()  # of the denoiser, in old configurations
    pipeline_name: ClassVar[str]  # in diffusers; imported when needed, because it imports transformers
    component: ClassVar[str]  # the denoiser's name in the pipeline
    sample_options: ClassVar[tuple[str, ...]] = ("resolution", "height", "width")  # the SampleOptions that it uses
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    text_components: ClassVar[tuple[str, ...]] = ()  # parts of the pipeline that encode prompts; empty without prompts
    null_is_empty_prompt: ClassVar[bool] = (
        True  # for families with prompts: whether the null condition is always the prompt ""
    )
    repeated_blocks: ClassVar[tuple[str, ...]] = ("ResnetBlock2D", "BasicTransformerBlock")  # classes to compile one by one
    has_xformers: ClassVar[bool] = True  # whether diffusers has an xformers version of its attention
    guidance_scale: ClassVar[float] = 7.5  # default for pictures
    base_model_version: ClassVar[str] = (
        ""  # `ss_base_model_version` in kohya's LoRA files; empty if ComfyUI has no such LoRA
    )
    architecture: ClassVar[str]  # see https://github.com/Stability-AI/ModelSpec
    pipeline_tag: ClassVar[str] = ""  # see https://huggingface.co/tasks; empty if none fits
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # what a preset changes for this family

    def matches(self, config: Config) -> bool:
        """Whether a denoiser of `denoiser_class` with this configuration belongs to the family."""
        return True

    def check(self, config: Config) -> None:
        """Raise a UserError for a variant of the architecture that needs more inputs than this family provides."""
        if config["in_channels"] != config["out_channels"]:
            raise UserError(
                f"the denoiser has {config['in_channels']} input and {config['out_channels']} output channels: "
                "it is a variant for inpainting, editing or image-to-video; train on the text-to-image or text-to-video "
                "model that it came from"
            )

    def check_sample_options(self, options: SampleOptions) -> None:
        """Raise a UserError for an option that this family does not support."""
        for field in fields(SampleOptions):
            value = getattr(options, field.name)
            if value != field.default and field.name not in self.sample_options:
                raise UserError(
                    f"{field.name} is {value}, but {self.name} models do not support it; leave it out (supported: "
                    f"{', '.join(self.sample_options)})"
                )
        if options.resolution and options.height and options.width:
            raise UserError(f"resolution is {options.resolution}, but height and width are given too; leave resolution out")

    @abstractmethod
    def sample_shape(self, config: Config, scale: int, options: SampleOptions) -> tuple[int, ...]:
        """The shape of one sample, without the batch dimension; `scale` is pixels per latent in each direction.

        Raises:
            UserError: the family does not support this size.
        """

    def padding(self, config: Config, options: SampleOptions) -> int:
        """Number of leading frames in a video sample that only the denoiser needs and that are not decoded."""
        return 0

    def pixels(self, sample_shape: tuple[int, ...], scale: int) -> tuple[int, int]:
        """(height, width) of a sample in pixels."""
        return sample_shape[-2] * scale, sample_shape[-1] * scale

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Shapes of the rows that `encode` returns, for a single prompt."""
        return {}

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        with silent():  # transformers suggests installing torchvision, which is not needed here
            return getattr(diffusers, self.pipeline_name)

    @property
    def takes_prompts(self) -> bool:
        return bool(self.text_components)

    def max_tokens(self, tokenizer: Any, config: Config) -> int:
        """The number of tokens, including special ones, after which a prompt is cut off."""
        return tokenizer.model_max_length

    def encode(self, pipeline: DiffusionPipeline, config: Config, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Arguments of the denoiser, one row per prompt: `[n, ...]`. Only for families with prompts."""
        raise NotImplementedError

    def encode_null(self, pipeline: DiffusionPipeline, config: Config) -> dict[str, Tensor]:
        """The same for the null condition, computed as in the family's pipeline: `[1, ...]`."""
        return self.encode(pipeline, config, [""])

    def classes(self, config: Config) -> dict[str, Tensor]:
        """Arguments of the denoiser: one row per class, then the null condition. For families without prompts."""
        return {}

    def constants(
        self, config: Config, sample_shape: tuple[int, ...], scale: int, options: SampleOptions
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Arguments of the denoiser that are the same for all samples: tensors `[1, ...]`, which are repeated per sample, or
        tuples of tensors, which are passed unchanged."""
        return {}

    def call(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        """model_output `[B, ...]`, with the shape of `sample`."""
        return denoiser(sample, timesteps, return_dict=False, **conditions)[0]


def image_size(config: Config, scale: int, options: SampleOptions) -> tuple[int, int]:
    """(height, width) in pixels, from `options` or else from the model's configuration.

    Raises:
        UserError: neither gives a size.
    """
    trained = config["sample_size"] or 0
    height, width = trained if isinstance(trained, (tuple, list)) else (trained, trained)
    size = options.size(height * scale, width * scale)
    if not all(size):
        raise UserError("the model's configuration has no sample_size; pass --resolution")
    return size


def check_size(options: SampleOptions, size: tuple[int, int], of: int) -> None:
    """Raises: UserError unless height and width are positive multiples of `of`."""
    for name, value in zip(("height", "width"), size, strict=True):
        if value < of or value % of:
            given = name if getattr(options, name) or not options.resolution else "resolution"
            near = max(of, round(value / of) * of)
            raise UserError(f"{given} is {value}; expected a multiple of {of} for this model, such as {near}")
