"""Where the parts of a model come from: a diffusers folder, a hub id, or a single file with a separate configuration.

No code is loaded with a model: weights are safetensors, and classes are diffusers' own.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfnpo.errors import UserError, first_line
from selfnpo.models.demo import DEMO_FOLDER
from selfnpo.models.origin import (
    SINGLE_FILE,
    find,
    offline,
    recognise,
    refuse_unsafe,
    weight_variants,
    why_not_loaded,
)
from selfnpo.options import DEMO, ModelOptions, SampleOptions
from selfnpo.progress import lasting

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

    from selfnpo.models.family import Config, Family

# The denoiser classes of all families. Others are refused before diffusers is imported.
DENOISERS = (
    "CogVideoXTransformer3DModel", "DiTTransformer2DModel", "Transformer2DModel", "UNet2DConditionModel", "UNet2DModel",
)  # fmt: skip
ONLY_OWN = ("revision", "variant", "single_file_config", "lora_name_or_path")  # options that the demo does not support
NOT_THE_DEMO = "the model is the embedded demo; pass your own with --pretrained_model_name_or_path, or leave it out"


class Source:
    """The parts of the model that `options` describe. Opening it only reads configurations.

    Raises:
        UserError: the model cannot be found, reached or recognised.
    """

    def __init__(self, options: ModelOptions):
        self.options = options
        name = options.pretrained_model_name_or_path
        self.is_demo = name == DEMO
        refuse_unsafe(name)
        self.file = Path(name) if name.endswith(SINGLE_FILE) else None
        if self.file is None:
            self.layout = str(DEMO_FOLDER) if self.is_demo else name
        else:
            self.layout = options.single_file_config or recognise(self.file)
        self._check_options()
        try:
            self.component, self.subfolder, self.config = self._find_denoiser()
        except UserError as error:
            if self.file is None or options.single_file_config is not None:
                raise
            raise UserError(
                f"{self.file} needs the configuration of {self.name}, which could not be read; pass a diffusers folder "
                f"with such a configuration as --single_file_config ({error})"
            ) from error
        self.family = self._find_family()
        self.family.check(self.config)
        if isinstance(options, SampleOptions):
            self.family.check_sample_options(options)
        if self.file is not None:
            from selfnpo.models.denoiser import check_single_file

            check_single_file(self.family.denoiser_class, self.file)

    def _check_options(self) -> None:
        """Refuse options that would have no effect on this model, or that the demo does not support.

        This is done before `_find_family`, which imports diffusers and takes seconds.
        """
        options = self.options
        if not math.isfinite(options.lora_scale):
            raise UserError(f"lora_scale is {options.lora_scale}; expected a finite number")
        if self.is_demo:
            sizes = fields(SampleOptions) if isinstance(options, SampleOptions) else ()
            for name in (*ONLY_OWN, *(field.name for field in sizes)):
                if (value := getattr(options, name)) != getattr(type(options), name):
                    raise UserError(f"{name} is {value}, but {NOT_THE_DEMO}")
        for name, acts, why in (
            ("revision", not Path(self.layout).is_dir(), f"{self.name} is not on the hub"),
            ("variant", self.file is None or options.denoiser_name_or_path, f"{self.file} is a single file"),
            ("single_file_config", self.file, f"{self.name} is not a single file"),
            ("lora_scale", options.lora_name_or_path, "no LoRA is merged into the base (--lora_name_or_path)"),
            ("lora_scale", options.lora_scale, "then the LoRA would do nothing"),
        ):
            value = getattr(options, name)
            if not acts and value != getattr(ModelOptions, name):
                raise UserError(f"{name} is {value}, but {why}; leave it out")

    @property
    def name(self) -> str:
        """Its name in messages; for a single file, the origin of its configuration."""
        return "the embedded demo" if self.is_demo else self.layout

    def _find_denoiser(self) -> tuple[str, str, Config]:
        """The denoiser's name in the pipeline, its folder and its configuration."""
        for component in ("unet", "transformer"):
            config = self._json(f"{component}/config.json")
            if config is not None:
                return component, component, config
        # Older unconditional models are in the same folder as model_index.json.
        index, config = self._json("model_index.json"), self._json("config.json")
        if index and config:
            for component in ("unet", "transformer"):
                if component in index:
                    return component, "", config
        raise UserError(
            f"{self.name} contains neither unet/config.json nor transformer/config.json; expected a diffusers pipeline"
            + (" (pass a UNet without a pipeline as --denoiser_name_or_path)" if config else "")
        )

    def _find_family(self) -> Family:
        class_name = self.config.get("_class_name")
        if class_name not in DENOISERS:
            raise self._of_no_family(class_name)
        from selfnpo.models.families import FAMILIES

        for family in FAMILIES:
            names = (family.denoiser_class.__name__, *family.former_class_names)
            if class_name in names and family.matches(self.config):
                # A configuration lists only what differs from the class's defaults.
                parameters = inspect.signature(family.denoiser_class.__init__).parameters.items()
                self.config = {
                    name: each.default for name, each in parameters if each.default is not each.empty
                } | self.config
                return family
        raise self._of_no_family(class_name)

    def _of_no_family(self, class_name: str) -> UserError:
        known = ", ".join(name for name in DENOISERS if name != "Transformer2DModel")  # DiTTransformer2DModel's old name
        return UserError(
            f"{self.name} is built on {class_name}, which cannot be trained here; expected {known}. "
            "selfnpo.guide() supports more pipelines if you have a negative: any fine-tune of the same architecture, "
            "such as an earlier or a merged checkpoint"
        )

    def _json(self, filename: str) -> dict[str, Any] | None:
        """Read a JSON file of the model's layout; None if there is no such file."""
        path = find(self.layout, filename, self.options)
        try:
            return None if path is None else json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{filename} of {self.name} could not be read: {first_line(error)}") from error

    @cached_property
    def scheduler(self) -> SchedulerMixin:
        """The pipeline's own scheduler, which defines the noise levels."""
        import diffusers

        for folder in ("scheduler", ""):
            config = self._json(f"{folder}/scheduler_config.json".lstrip("/"))
            if config is None:
                continue
            scheduler_class = getattr(diffusers, str(config.get("_class_name")), None)
            if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
                raise UserError(
                    f"the scheduler of {self.name} is {config.get('_class_name')}, which diffusers does not know"
                )
            if self.options.prediction_type is not None:
                config["prediction_type"] = self.options.prediction_type
            return scheduler_class.from_config(config)
        raise UserError(f"{self.name} has no scheduler/scheduler_config.json; expected a complete diffusers pipeline")

    @cached_property
    def scale(self) -> int:
        """Pixels per latent in each direction; 1 for models in pixel space."""
        config = self._json("vae/config.json")
        if config is None and self._json("vqvae/config.json") is not None:
            raise UserError(
                f"{self.name} has a vqvae, which is not supported; expected a model with a vae, or in pixel space"
            )
        return 1 if config is None else 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def has_vae(self) -> bool:
        return self._json("vae/config.json") is not None

    def check_vae(self) -> None:
        """Raise a UserError early if the VAE's weights are missing or damaged. Those on the hub are trusted."""
        from selfnpo.models.denoiser import check_headers

        check_headers(Path(self.layout) / "vae", self.options.variant)
        is_here = self.file is None and (Path(self.layout).is_dir() or offline(self.options))
        if is_here and self.has_vae and not weight_variants(self.layout, "vae", self.options):
            why = why_not_loaded(self.layout, "vae", self.options, "DiffusionPipeline")
            raise UserError(why or f"{self.name} contains no weights for its vae; expected a complete pipeline")

    def vae(self) -> ModelMixin | None:
        """The autoencoder in float32, or None for models in pixel space."""
        if not self.has_vae:
            return None
        import torch

        return self.pipeline(("vae",), torch.float32).vae.eval().requires_grad_(False)

    def empty_denoiser(self) -> ModelMixin:
        """The denoiser without weights, on the meta device."""
        from selfnpo.models.denoiser import empty_denoiser

        return empty_denoiser(self.family.denoiser_class, self.config)

    def denoiser(self, dtype: torch.dtype) -> ModelMixin:
        """The base's denoiser on the CPU, with its replacement and LoRA applied, in evaluation mode.

        Raises:
            UserError: weights are missing, corrupt or in an unsafe format, or have a different architecture.
        """
        from selfnpo.models.denoiser import load_denoiser
        from selfnpo.models.lora.read import merge_lora

        options, family = self.options, self.family
        if options.denoiser_name_or_path is None:
            model = load_denoiser(
                family.denoiser_class, self.file or self.layout, self.subfolder, dtype, options, self.layout
            )
        else:
            model = self.replacement(options.denoiser_name_or_path, dtype)
        if options.lora_name_or_path is not None:
            merge_lora(model, family.pipeline_class, family.component, options, dtype)
        return model

    def replacement(self, name: str, dtype: torch.dtype) -> ModelMixin:
        """Load another denoiser with the base's architecture: from its own folder, or from a pipeline."""
        from selfnpo.models.denoiser import load_replacement, shapes_of

        kind, expected = self.family.denoiser_class, shapes_of(self.empty_denoiser())
        return load_replacement(kind, name, self.component, expected, dtype, self.options, self.layout)

    def check_replacement(self, name: str) -> None:
        """Raise a UserError for a denoiser that `replacement` would refuse. Only reads its configuration and headers."""
        from selfnpo.models.denoiser import check_replacement, shapes_of

        kind, expected = self.family.denoiser_class, shapes_of(self.empty_denoiser())
        names = (kind.__name__, *self.family.former_class_names)
        check_replacement(kind, names, name, self.component, expected, self.options, self.layout)

    def pipeline(self, wanted: tuple[str, ...], dtype: torch.dtype) -> DiffusionPipeline:
        """The family's pipeline with only the components in `wanted` and the scheduler.

        Raises:
            UserError: one of them is missing or cannot be loaded.
        """
        import diffusers
        from packaging.version import Version
        from torch import nn

        from selfnpo.models.denoiser import check_complete, check_headers, reason
        from selfnpo.models.foreign import silent

        dtype_name = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
        kind, options = self.family.pipeline_class, self.options
        expected, _ = kind._get_signature_keys(kind)
        left_out = {name: None for name in expected if name not in (*wanted, "scheduler")}
        index = self._json("model_index.json") or {}
        for name in wanted:
            if index.get(name, (None, None))[0] is None:
                raise UserError(f"{self.name} has no {name} in its model_index.json; expected a complete {kind.__name__}")
        try:
            with silent(), lasting(f"loading {', '.join(wanted)} of {self.name}"):
                if self.file is not None:
                    pipeline = kind.from_single_file(
                        str(self.file), config=self.layout, local_files_only=options.local_files_only,
                        **{dtype_name: dtype}, **left_out,
                    )  # fmt: skip
                else:
                    pipeline = kind.from_pretrained(
                        self.layout, revision=options.revision, variant=options.variant, use_safetensors=True,
                        local_files_only=options.local_files_only, scheduler=self.scheduler, **{dtype_name: dtype},
                        **left_out,
                    )  # fmt: skip
        except Exception as error:  # as above
            parts = wanted if self.file is None else ()
            for name in parts:
                check_headers(Path(self.layout) / name, options.variant)
            why = (why_not_loaded(self.layout, name, options, "DiffusionPipeline") for name in parts)
            told = f"{', '.join(wanted)} of {self.name} could not be loaded from safetensors: {reason(error)}"
            raise UserError(next(filter(None, why), told)) from error
        for name in wanted:
            if isinstance(part := getattr(pipeline, name), nn.Module):
                check_complete(part, str(self.file or self.layout))
        return pipeline
