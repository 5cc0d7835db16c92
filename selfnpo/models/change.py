"""Read full weights or a LoRA as a change to a denoiser that is already loaded, for example in a user's pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from selfnpo.models.denoiser import check_same_architecture, empty_denoiser, load_replacement
from selfnpo.models.lora.read import Offset, is_lora, read_offsets
from selfnpo.options import ModelOptions

Change = Mapping[str, Tensor] | Mapping[str, Offset]
"""Weights by name, or LoRA offsets by layer path."""
# What load_ip_adapter adds to a UNet.
IP_ADAPTER = ("encoder_hid_proj.", ".processor.")


def read_change(
    change: nn.Module | str | Path,
    pipe: DiffusionPipeline,
    component: str,
    denoiser: ModelMixin,
    shapes: Mapping[str, torch.Size],
) -> Change:
    """Read weights or offsets for the denoiser of a pipeline.

    Args:
        change: a denoiser, or the folder, hub id or file of a denoiser or LoRA.
        component: name of the denoiser in the pipeline.
        shapes: shapes of the denoiser's weights, by name.

    Raises:
        UserError: it cannot be read or belongs to another architecture.
    """
    shapes = _own(shapes)
    if isinstance(change, nn.Module):
        weights = _own(dict(unwrap_module(change).named_parameters()))
        check_same_architecture(f"the {type(change).__name__}", shapes, {key: each.shape for key, each in weights.items()})
        return weights
    name, kind, config = str(change), type(denoiser), dict(denoiser.config)
    base = getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__
    options = ModelOptions(pretrained_model_name_or_path=base, lora_name_or_path=name)
    if not is_lora(name, options):
        model = load_replacement(kind, name, component, shapes, denoiser.dtype, options, base)
        return dict(model.named_parameters())
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        config["encoder_hid_dim_type"] = None
    reader = type(pipe)
    if not hasattr(reader, "lora_state_dict") and hasattr(kind, "load_lora_adapter"):
        reader = StableDiffusionLoraLoaderMixin  # some pipelines have a UNet that supports LoRAs, but no reader for them
    return read_offsets(empty_denoiser(kind, config), reader, component, options)


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out an IP-Adapter's weights, which stay the same in both branches."""
    return {key: value for key, value in values.items() if not any(part in key for part in IP_ADAPTER)}
