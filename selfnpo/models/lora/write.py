"""Write a LoRA in both common formats: diffusers', and kohya's, which ComfyUI reads completely."""

import json
from datetime import datetime, timezone
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from selfnpo.models.lora.read import LORA_FILE


def model_spec(architecture: str, title: str, **further: str) -> dict[str, str]:
    """Metadata for a safetensors header, see https://github.com/Stability-AI/ModelSpec."""
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture,
        "implementation": "diffusers",
        "title": title,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return {f"modelspec.{name}": value for name, value in (values | further).items()}


def save_lora(
    folder: Path,
    state_dict: dict[str, Tensor],
    lora: LoraConfig,
    *,
    component: str,
    kohya_name: str,
    metadata: dict[str, str],
) -> None:
    """Write pytorch_lora_weights.safetensors with diffusers' keys, and a second file with the same weights and kohya's keys.

    Args:
        state_dict: adapters with peft's names, as from `get_peft_model_state_dict`.
        component: "unet" or "transformer".
        kohya_name: name of the second file; empty to write none.
        metadata: for the headers of both files.
    """
    weights = {f"{component}.{name}": tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    adapter = {name: sorted(value) if isinstance(value, set) else value for name, value in lora.to_dict().items()}
    header = json.dumps({f"{component}.{name}": value for name, value in adapter.items()}, default=str, sort_keys=True)
    save_file(weights, folder / LORA_FILE, {"format": "pt", LORA_ADAPTER_METADATA_KEY: header} | metadata)
    if kohya_name:
        renamed = convert_state_dict_to_kohya(weights)
        alpha = torch.tensor(float(lora.lora_alpha))  # diffusers would write the rank
        renamed = {key: alpha.clone() if key.endswith(".alpha") else tensor for key, tensor in renamed.items()}
        network = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(lora.r),
            "ss_network_alpha": str(float(lora.lora_alpha)),
        }
        save_file(renamed, folder / kohya_name, {"format": "pt"} | metadata | network)
