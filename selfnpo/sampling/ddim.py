"""Sampling with guidance away from a negative model: eps = (w + 1) eps_pos(x, t, c) - w eps_neg(x, t, null)."""

import torch
from torch import Tensor, nn

from selfnpo.models import PretrainedModel
from selfnpo.progress import progress
from selfnpo.randomness import Site
from selfnpo.schedule import make_grid, step_rows
from selfnpo_kernels import guided_step, philox_normal


def start_noise(base: PretrainedModel, count: int, seed: int) -> Tensor:
    """x_T for `count` samples, the same for all methods in a comparison: `[count, ...]`."""
    return noise_of(base, torch.arange(count), seed)


def noise_of(base: PretrainedModel, numbers: Tensor, seed: int) -> Tensor:
    """x_T for the samples with these numbers `[B]`, independent of how they are batched: `[B, ...]`."""
    return philox_normal((len(numbers), *base.sample_shape), seed, 0, Site.SAMPLE_NOISE, base.move(numbers))


def plain_guidance(base: PretrainedModel, condition: Tensor, guidance_scale: float) -> tuple[float, str]:
    """The guidance scale for sampling without a negative model, and a name for those samples.

    If every condition in `[B]` is the null condition, as in unconditional models and for most empty prompts, guidance has no
    effect: at any scale, the samples are those of the base itself.
    """
    index = condition.unique()
    rows, null = (base.conditions.select(each, base.device) for each in (index, torch.full_like(index, base.null_condition)))
    if all(rows[name].cpu().equal(null[name].cpu()) for name in base.conditions.rows):
        return 1.0, "the base itself"
    return guidance_scale, "plain guidance (CFG)"


def title(name: str, guidance_scale: float) -> str:
    """A method's name in pictures and tables."""
    return f"{name}, no guidance" if guidance_scale == 1 else f"{name}, guidance_scale = {guidance_scale:g}"


@torch.no_grad()
def ddim_sample(
    base: PretrainedModel,
    noise: Tensor,
    condition: Tensor,
    guidance_scale: float,
    negative_model: nn.Module | None = None,
    positive_model: nn.Module | None = None,
    num_inference_steps: int = 25,
    batch_size: int = 1000,
) -> Tensor:
    """Deterministic DDIM samples `[B, ...]` from `noise` `[B, ...]` for `condition` `[B]`, a CPU tensor.

    Args:
        guidance_scale: w + 1. At 1 the negative model is not evaluated.
        negative_model, positive_model: denoisers with the base's architecture; by default the base itself. With the base as
            the negative, this is plain guidance (CFG).
        batch_size: samples per forward pass.
    """
    positive, negative = positive_model or base.denoiser, negative_model or base.denoiser
    grid = make_grid(base.scheduler, num_inference_steps)
    rows, timesteps = base.move(step_rows(grid)), grid.timesteps.float()
    finished = []
    for sample, asked in zip(noise.split(batch_size), condition.split(batch_size), strict=True):
        null = torch.full_like(asked, base.null_condition)
        steps = progress(zip(timesteps, rows, strict=True), desc="sample", total=len(rows), unit="step", leave=False)
        for timestep, row in steps:
            t = timestep.expand(len(sample))
            cond = base.predict(positive, sample, t, asked)
            uncond = None if guidance_scale == 1 else base.predict(negative, sample, t, null)
            sample, _ = guided_step(sample, cond, uncond, guidance_scale, row.expand(len(sample), -1))
        finished.append(sample)
    return torch.cat(finished)
