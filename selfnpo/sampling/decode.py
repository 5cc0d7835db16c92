"""From samples to images and videos that can be looked at."""

from collections.abc import Iterator

import torch
from diffusers import ModelMixin
from torch import Tensor

from selfnpo.models import PretrainedModel
from selfnpo.output import progress

FRAMES = 4  # of a video, evenly spaced, in a picture


def decode_samples(base: PretrainedModel, samples: Tensor, vae: ModelMixin | None = None) -> Tensor:
    """Images `[n, channels, H, W]` in [-1, 1] on the CPU; of every video a few frames, so that n exceeds the batch."""
    decoded = []
    for frames in decode_frames(base, samples, vae):
        shown = torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).long()
        decoded.append(frames[shown].clone())  # what is not shown is freed
    return torch.cat(decoded)


def open_vae(base: PretrainedModel) -> ModelMixin | None:
    """The autoencoder on the base's device; None for models in pixel space."""
    vae = base.source.vae() if base.source else None
    return None if vae is None else vae.to(base.device)


@torch.no_grad()
def decode_frames(base: PretrainedModel, samples: Tensor, vae: ModelMixin | None = None) -> Iterator[Tensor]:
    """All frames `[frames, channels, H, W]` in [-1, 1] of one sample after the other, on the CPU; an image is one frame.

    Args:
        vae: from `open_vae`, to decode many batches with; by default it is loaded for this call alone.
    """
    vae = vae or open_vae(base)
    if vae is None:
        yield from samples.cpu().unsqueeze(1)
        return
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    for sample in progress(samples, desc="decode", unit="sample", leave=False):
        yield _decode(vae, sample[None, base.padding :].float() / vae.config.scaling_factor + shift)


def _decode(vae: torch.nn.Module, latent: Tensor) -> Tensor:
    if latent.ndim == 4:
        return vae.decode(latent).sample.cpu()
    return vae.decode(latent.transpose(1, 2)).sample[0].transpose(0, 1).cpu()  # diffusers' VAEs take the channels first
