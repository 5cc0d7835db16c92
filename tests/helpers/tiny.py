"""Tiny random models of every family, saved to disk as diffusers pipelines: what tests and the README's commands load here.

python tests/helpers/tiny.py stable_diffusion /tmp/tiny-sd
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)  # fmt: skip
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)  # fmt: skip

CHARACTERS = ["▁", *(chr(code) for code in range(33, 127))]
WIDTH, SECOND_WIDTH = 32, 24  # of text encoders; single files tell SDXL's two by it
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def without_zeros(model: nn.Module) -> nn.Module:
    """Layers that start at zero, as the last one of a diffusion transformer does, with small weights instead."""
    for name, parameter in model.named_parameters():
        if not parameter.any() and not name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def clip_tokenizer() -> CLIPTokenizer:
    """Knows every byte by itself, so that it can spell anything."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:  # by files, which every release of transformers reads
        (Path(folder) / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_sentencepiece(Path(folder))
        return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def clip_config(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def autoencoder(factor: float = 0.18215) -> AutoencoderKL:
    """Eight pixels per latent, as the real ones."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8,) * 4,
        latent_channels=4, norm_num_groups=4, sample_size=64, scaling_factor=factor,
    )  # fmt: skip


def unet(**options: object) -> UNet2DConditionModel:
    levels = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, norm_num_groups=8, attention_head_dim=2, **(levels | options)
    )  # fmt: skip


def stable_diffusion(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(clip_config(tokenizer)), tokenizer=tokenizer,
        unet=unet(cross_attention_dim=WIDTH), scheduler=PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def stable_diffusion_xl(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    StableDiffusionXLPipeline(
        vae=autoencoder(0.13025), text_encoder=CLIPTextModel(clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, SECOND_WIDTH)),
        tokenizer=tokenizer, tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=WIDTH + SECOND_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + SECOND_WIDTH, use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    ).save_pretrained(folder)  # fmt: skip


def cogvideox(folder: Path, rotary: bool = False) -> None:
    tokenizer = t5_tokenizer()
    text = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, is_encoder_decoder=False
    )
    CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=T5EncoderModel(text),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
            temporal_compression_ratio=4, sample_height=64, sample_width=64,
        ),
        transformer=without_zeros(CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=WIDTH, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=16,
            use_rotary_positional_embeddings=rotary,
        )),
        scheduler=CogVideoXDDIMScheduler(
            **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
            timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
        ),
    ).save_pretrained(folder)  # fmt: skip


def cogvideox_rotary(folder: Path) -> None:
    cogvideox(folder, rotary=True)


def unconditional(folder: Path) -> None:
    DDPMPipeline(
        unet=UNet2DModel(
            sample_size=16, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        ),
        scheduler=DDPMScheduler(),
    ).save_pretrained(folder)  # fmt: skip


def unconditional_flat(folder: Path) -> None:
    """The older layout, in which everything lies beside model_index.json."""
    unconditional(folder)
    for name in ("unet", "scheduler"):
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        shutil.rmtree(folder / name)


def class_conditional(folder: Path) -> None:
    DiTPipeline(
        transformer=without_zeros(DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
        )),
        vae=autoencoder(), scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    ).save_pretrained(folder)  # fmt: skip
    index = folder / "model_index.json"  # diffusers reads the labels from here, but does not write them
    labels = {str(number): str(number) for number in range(10)}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": labels}, indent=2))


FAMILIES: dict[str, Callable[[Path], None]] = {
    build.__name__: build
    for build in (
        stable_diffusion, stable_diffusion_xl, cogvideox, cogvideox_rotary, unconditional, unconditional_flat,
        class_conditional,
    )
}  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """Build the tiny model of a family, always with the same weights, and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FAMILIES[family](folder)
    for file in folder.glob("*/tokenizer.json"):
        as_published(file)
    return folder


def as_published(file: Path) -> None:
    """The files that repositories have in place of a tokenizer.json, which is younger than most of them."""
    tokenizer = Tokenizer.from_file(str(file))
    file.unlink()
    if isinstance(tokenizer.model, BPE):
        tokenizer.model.save(str(file.parent))
    else:
        write_sentencepiece(file.parent)


def write_sentencepiece(folder: Path) -> None:
    with (folder / "spiece.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["".join(CHARACTERS[1:])]), model_writer=writer, model_type="char",
            vocab_size=len(CHARACTERS) + 3, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(f"written to {save(arguments.family, arguments.folder)}")
