"""Read a LoRA in any format that diffusers supports, to merge it into a base or as offsets of its layers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from selfnpo.errors import UserError, first_line
from selfnpo.models.origin import SINGLE_FILE, find, refuse_unsafe
from selfnpo.options import ModelOptions

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
ADAPTER = "selfnpo"


@dataclass(frozen=True)
class Offset:
    """What a LoRA adds to the output of one layer: scale * up(down(x))."""

    down: Tensor  # weight of a linear layer or a convolution: [rank, inputs, ...]
    up: Tensor  # [outputs, rank, ...]
    scale: float

    def weight(self) -> Tensor:
        """The equivalent change of the layer's weight: `[outputs, inputs, ...]`, in float32."""
        joined = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * joined.unflatten(1, self.down.shape[1:])


def is_lora(name: str, options: ModelOptions) -> bool:
    """Whether a folder, a hub id or a file is a LoRA.

    Raises:
        UserError: it does not exist, or is not a safetensors file.
    """
    if not name.endswith(SINGLE_FILE):
        return find(name, LORA_FILE, options) is not None
    if not Path(name).is_file():
        raise UserError(f"{name} does not exist; expected a {SINGLE_FILE} file, a folder or a Hugging Face id")
    try:
        with safe_open(name, framework="pt") as file:
            return any("lora" in key.lower() for key in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{name} could not be read as safetensors: {first_line(error)}") from error


def merge_lora(
    model: ModelMixin, pipeline_class: type[DiffusionPipeline], component: str, options: ModelOptions, dtype: torch.dtype
) -> None:
    """Add the LoRA of `options`, at its scale, to the weights of a denoiser.

    Raises:
        UserError: the LoRA cannot be read, or belongs to another base.
    """
    _load(model, pipeline_class, component, options)
    try:
        model.fuse_lora(lora_scale=options.lora_scale, safe_fusing=True, adapter_names=[ADAPTER])
    except ValueError as error:
        raise UserError(f"{options.lora_name_or_path} does not fit the base: {first_line(error)}") from error
    model.unload_lora()
    nn.Module.to(model, dtype)  # diffusers' own `to` warns about modules to keep in float32; there are none


def read_offsets(
    empty: ModelMixin, pipeline_class: type[DiffusionPipeline], component: str, options: ModelOptions
) -> dict[str, Offset]:
    """Read the LoRA of `options` as offsets by layer path, as in `named_modules()`.

    Args:
        empty: the base's denoiser without weights, on the meta device. It cannot be used afterwards.
        component: name of the denoiser in the pipeline.

    Raises:
        UserError: the LoRA cannot be read, belongs to another base, or contains more than low-rank offsets.
    """
    name = options.lora_name_or_path
    for layer in empty.modules():
        for key, weight in layer.named_parameters(recurse=False):  # peft creates a LoRA on the base's device
            hollow = torch.zeros((), dtype=torch.float32).expand(weight.shape)
            layer.register_parameter(key, nn.Parameter(hollow, requires_grad=False))
    _load(empty, pipeline_class, component, options)
    offsets = {}
    for path, layer in empty.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            if layer.use_dora.get(ADAPTER) or layer.lora_bias.get(ADAPTER):
                raise UserError(
                    f"{name} contains more than low-rank offsets (DoRA or biases); merge it into a full model first"
                )
            offsets[path] = Offset(down.weight.detach(), up.weight.detach(), float(layer.scaling[ADAPTER]))
    return offsets


def _load(model: ModelMixin, kind: type[DiffusionPipeline], component: str, options: ModelOptions) -> None:
    """Load a LoRA into a denoiser as a peft adapter."""
    name, base = options.lora_name_or_path, options.pretrained_model_name_or_path
    state_dict, alphas, metadata = read_lora(model, kind, component, options)
    ours = {key: tensor for key, tensor in state_dict.items() if key.startswith(f"{component}.")}
    if len(ours) < len(state_dict):
        print(f"note: {name} also changes the text encoder; only its {component} part is used")
    try:
        model.load_lora_adapter(
            ours, prefix=component, network_alphas=None if metadata else alphas, metadata=metadata, adapter_name=ADAPTER
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{name} does not fit {base}: {first_line(error)}") from error


def read_lora(
    model: ModelMixin, kind: type[DiffusionPipeline], component: str, options: ModelOptions
) -> tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]:
    """Weights, alphas and metadata of the LoRA of `options`, as diffusers reads them.

    Args:
        model: the base's denoiser, with or without weights.
        component: its name in the pipeline.

    Raises:
        UserError: the LoRA cannot be read, or belongs to another base.
    """
    name, base = options.lora_name_or_path, options.pretrained_model_name_or_path
    refuse_unsafe(name)
    if not hasattr(kind, "lora_state_dict"):
        raise UserError(
            f"{name} is a LoRA, but diffusers does not support LoRAs for {kind.__name__}; expected a full denoiser"
        )
    options = replace(options, revision=options.revision if name == base else None)
    known = {"unet_config": model.config} if component == "unet" else {}
    # Without network access, diffusers needs the file name.
    if name.endswith(SINGLE_FILE):
        known["weight_name"] = Path(name).name
    elif find(name, LORA_FILE, options):
        known["weight_name"] = LORA_FILE
    try:
        found = kind.lora_state_dict(
            name, return_lora_metadata=True, use_safetensors=True, local_files_only=options.local_files_only,
            revision=options.revision, **known,
        )  # fmt: skip
        state_dict, metadata = found[0], found[-1]
        alphas = found[1] if len(found) == 3 else None
    except Exception as error:  # diffusers raises many types
        raise UserError(f"{name} could not be read as a LoRA from safetensors: {first_line(error)}") from error
    prefix = f"{component}."
    _check_lora(name, {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}, prefix, model)
    return state_dict, alphas, metadata


def _check_lora(name: str, state_dict: dict[str, Tensor], prefix: str, model: ModelMixin) -> None:
    if not state_dict:
        raise UserError(f"{name} changes nothing in the {prefix.rstrip('.')}; expected a LoRA for this model family")
    layers = dict(model.named_modules())
    for key, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} contains weights that are inf or NaN, such as {key}; restore it from an intact copy")
        path, _, kind = key.removeprefix(prefix).partition(".lora")
        weight = getattr(layers.get(path), "weight", None)
        if kind.startswith(("_A", ".down")) and (weight is None or weight.shape[1] != tensor.shape[1]):
            got = "has no such layer" if weight is None else f"has {weight.shape[1]} inputs in that layer"
            raise UserError(
                f"{name} is a LoRA for another base: it changes {path} ({tensor.shape[1]} inputs), but this base {got}"
            )
