"""Models some way off their base, as a fine-tune is, and LoRAs: what tests take for negatives and positives."""

from copy import deepcopy
from pathlib import Path

import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from selfnpo.models import ModelOptions, Source
from selfnpo.models.lora.write import save_lora

WEIGHTS = "diffusion_pytorch_model.safetensors"


def changed(denoiser: ModelMixin, seed: int = 1, by: float = 0.05) -> ModelMixin:
    """A copy whose weights have moved a little, all but an IP-Adapter's, which no negative has."""
    copy, generator = deepcopy(denoiser), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in copy.named_parameters():
            if "processor" not in name and "encoder_hid_proj" not in name:
                weight += by * torch.randn(weight.shape, generator=generator)
    return copy


def denoiser(base: Path) -> nn.Module:
    return Source(ModelOptions(str(base))).denoiser(torch.float32)


def fine_tune(base: Path, folder: Path, seed: int = 1, **options) -> Path:
    """The folder of a model that differs from its base in every weight."""
    changed(denoiser(base), seed, by=0.02).save_pretrained(folder, **options)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: tensor.double() for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def save_both_loras(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA of rank 2 and alpha 6 for linear layers and convolutions, in diffusers' and kohya's format."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_out.0", "conv1"], init_lora_weights=False)
    model = denoiser(base)
    model.add_adapter(settings)
    folder.mkdir()
    state = get_peft_model_state_dict(model)
    save_lora(folder, state, settings, component="unet", kohya_name="kohya.safetensors", metadata={})
    return folder
