"""Images as training samples: read, scaled, cropped, encoded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image, ImageOps
from torch import Tensor

from selfnpo.errors import UserError
from selfnpo.progress import progress


def load_image(path: Path, height: int, width: int, channels: int = 3) -> Tensor:
    """`[channels, H, W]` in [-1, 1]: upright, on white if transparent, scaled to cover the size, centre-cropped.

    With one channel it is the mean of the three colours.

    Raises:
        UserError: the file is not an image, or channels is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise UserError(f"the model takes {channels} channels, but images have 1 or 3; use --rollout pool, which needs none")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit, which Pillow would clip to 8 bits
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("RGBA")
    except Exception as error:  # Pillow raises many types, even SyntaxError and struct.error
        raise UserError(f"{path} could not be read as an image; remove it or restore it from an intact copy") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels if channels == 3 else pixels.mean(0, keepdim=True)


@torch.no_grad()
def encode_images(
    vae: ModelMixin | None, files: Sequence[Path], height: int, width: int, device: torch.device, channels: int = 3
) -> Tensor:
    """Samples `[n, ...]` in float32 on the CPU: latents (the VAE's mode, scaled as in pipelines), or images without a VAE.

    Args:
        vae: in float32; an image VAE gives `[n, C, h, w]`, a video VAE `[n, 1, C, h, w]`.
        channels: channels of the images, 3 for a VAE.

    Raises:
        UserError: a file is not an image, or channels is neither 1 nor 3.
    """
    if vae is not None:
        vae.to(device)
    found = []
    for path in progress(files, desc="encode images", unit="image"):
        image = load_image(path, height, width, channels)[None]
        found.append(image if vae is None else _encode(vae, image.to(device)).cpu())
    return torch.cat(found)


def _encode(vae: ModelMixin, image: Tensor) -> Tensor:
    """Inverts the pipeline's `decode_latents`. CogVideoX's invert_scale_latents applies only to conditioning images."""
    is_video = hasattr(vae.config, "temporal_compression_ratio")
    latent = vae.encode(image.unsqueeze(2) if is_video else image).latent_dist.mode()
    latent = (latent - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    return latent.transpose(1, 2) if is_video else latent
