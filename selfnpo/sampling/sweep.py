"""Samples from equal noise over guidance scales and strengths of the negative."""

from collections.abc import Sequence
from copy import deepcopy

from diffusers import ModelMixin
from torch import Tensor, nn

from selfnpo.mixing import mix_
from selfnpo.models import PretrainedModel
from selfnpo.output import progress
from selfnpo.sampling.ddim import ddim_sample, plain_guidance


def sweep(
    base: PretrainedModel,
    trained: ModelMixin,
    tuned: ModelMixin | None,
    noise: Tensor,
    condition: Tensor,
    guidance_scales: Sequence[float],
    betas: Sequence[float],
    alpha: float = 1.0,
    num_inference_steps: int = 25,
    batch_size: int = 1000,
) -> dict[tuple[float, float | None], Tensor]:
    """Samples `[B, ...]` by (guidance scale, beta), and under (guidance scale, None) those of plain guidance.

    The models come in float32 on the host and are used up: each is brought to the base's device and dtype when it samples,
    where no more than a positive and a negative lie at a time. With several betas the originals stay on the host.

    Args:
        trained: theta + delta, the result of the training.
        tuned: theta + eta, the positive model; by default the base itself.
        noise, condition: `[B, ...]`, `[B]` as in `ddim_sample`.
        alpha: share of eta in the negatives, see `mix_`.
    """
    plain_scales = [plain_guidance(base, condition, scale)[0] for scale in guidance_scales]
    total = len(guidance_scales) * len(betas) + len(set(plain_scales))
    bar = progress(total=total, desc="compare", unit="grid", leave=False)
    keep = deepcopy if len(betas) > 1 else lambda model: model

    def sample(guidance_scale: float, negative: nn.Module) -> Tensor:
        options = guidance_scale, negative, positive, num_inference_steps, batch_size
        samples = ddim_sample(base, noise, condition, *options)
        bar.update()
        return samples

    found, positive = {}, None
    for beta in betas:
        negative = keep(trained)
        mix_(negative, base.denoiser, tuned, alpha, beta)
        nn.Module.to(negative, base.device, base.dtype)
        positive = positive or nn.Module.to(keep(tuned or base.denoiser), base.device, base.dtype)
        found |= {(scale, beta): sample(scale, negative) for scale in guidance_scales}
    plain = {scale: sample(scale, positive) for scale in dict.fromkeys(plain_scales)}
    bar.close()
    return found | {(scale, None): plain[at] for scale, at in zip(guidance_scales, plain_scales, strict=True)}
