"""The one-file format in which Stable Diffusion checkpoints are shared, written from a diffusers folder."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    # Two levels of one layer each, as tests/helpers/tiny.py has them.
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv", "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1", "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}  # fmt: skip
VAE = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{3 - int(found[1])}.block.{found[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"\.group_norm", ".norm"),
    (r"\.to_([qkv])\b", r".\1"),
    (r"\.to_out\.0", ".proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def _unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        prefix = max((old for old in UNET if name.startswith(f"{old}.")), key=len)
        rest = name.removeprefix(f"{prefix}.")
        if "resnets" in prefix:
            layer, kind = rest.split(".")
            rest = f"{RESNET[layer]}.{kind}"
        found[f"model.diffusion_model.{UNET[prefix]}.{rest}"] = tensor
    return found


def _vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        for old, new in VAE:
            name = re.sub(old, new, name)
        is_projection = "attn_1" in name and name.endswith("weight") and "norm" not in name
        found[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_projection else tensor
    return found


def _open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = {
        "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    found, parts = {}, {}
    for name, tensor in weights.items():
        name = name.removeprefix("text_model.")
        if match := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            number, kind = match[1], match[3]
            if projection := re.fullmatch(r"self_attn\.([qkv])_proj", match[2]):
                parts.setdefault(f"transformer.resblocks.{number}.attn.in_proj_{kind}", {})[projection[1]] = tensor
            else:
                found[f"transformer.resblocks.{number}.{layer[match[2]]}.{kind}"] = tensor
        else:
            new = {
                "embeddings.token_embedding.weight": "token_embedding.weight",
                "embeddings.position_embedding.weight": "positional_embedding",
                "final_layer_norm.weight": "ln_final.weight",
                "final_layer_norm.bias": "ln_final.bias",
                "text_projection.weight": "text_projection",
            }[name]
            found[new] = tensor.T.contiguous() if new == "text_projection" else tensor
    return found | {name: torch.cat([three[each] for each in "qkv"]) for name, three in parts.items()}


def save_single_file(pipeline: Path, file: Path, sdxl: bool = False) -> Path:
    """Write a saved pipeline of tests/helpers/tiny.py, Stable Diffusion's or SDXL's, as one file."""
    unet, vae = (load_file(pipeline / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "vae"))
    text = load_file(pipeline / "text_encoder" / "model.safetensors")
    prefix = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    weights = _unet(unet) | _vae(vae)
    weights |= {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    if sdxl:
        second = _open_clip(load_file(pipeline / "text_encoder_2" / "model.safetensors"))
        weights |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    return file
