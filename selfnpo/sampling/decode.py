"""Decode samples to images and videos."""

from collections.abc import Iterator

import torch
from diffusers import ModelMixin
from torch import Tensor

from selfnpo.models import PretrainedModel
from selfnpo.progress import progress

FRAMES = 4  # evenly spaced frames that a picture shows of a video


def decode_samples(base: PretrainedModel, samples: Tensor, vae: ModelMixin | None = None) -> Tensor:
    """Images `[n, channels, H, W]` in [-1, 1] on the CPU. A video gives several frames, so n can exceed the batch size."""
    decoded = []
    for frames in decode_frames(base, samples, vae):
        shown = torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).long()
        decoded.append(frames[shown].clone())  # frees the other frames
    return torch.cat(decoded)


def open_vae(base: PretrainedModel) -> ModelMixin | None:
    """The autoencoder on the base's device; None for models in pixel space."""
    vae = base.source.vae() if base.source else None
    return None if vae is None else vae.to(base.device)


@torch.no_grad()
def decode_frames(base: PretrainedModel, samples: Tensor, vae: ModelMixin | None = None) -> Iterator[Tensor]:
    """Yield all frames `[frames, channels, H, W]` in [-1, 1] of each sample in turn, on the CPU. An image has one frame.

    Args:
        vae: from `open_vae`, if there are many batches to decode; by default it is loaded for this call only.
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
    return (
        vae.decode(latent.transpose(1, 2)).sample[0].transpose(0, 1).cpu()
    )  # diffusers' VAEs expect channels before frames
