"""From samples to images that can be looked at."""

import torch
from torch import Tensor
from tqdm import tqdm

from selfnpo.models import PretrainedModel

FRAMES = 4  # of a video, evenly spaced, in a picture


@torch.no_grad()
def decode_samples(base: PretrainedModel, samples: Tensor) -> Tensor:
    """Images `[n, channels, H, W]` in [-1, 1] on the CPU; of every video a few frames, which makes n larger than the batch.

    The VAE is loaded for this call alone and decodes one sample at a time.
    """
    vae = base.source.vae() if base.source else None
    if vae is None:
        return samples.cpu()
    vae.to(base.device)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    progress = tqdm(samples, desc="decode", leave=False, disable=None)
    return torch.cat([_decode(vae, sample[None].float() / vae.config.scaling_factor + shift) for sample in progress])


def _decode(vae: torch.nn.Module, latent: Tensor) -> Tensor:
    if latent.ndim == 4:
        return vae.decode(latent).sample.cpu()
    video = vae.decode(latent.transpose(1, 2)).sample[0].transpose(0, 1)  # diffusers' VAEs take the channels first
    return video[torch.linspace(0, len(video) - 1, min(FRAMES, len(video))).long().to(video.device)].cpu()
