"""Sample from the same noise over guidance scales and strengths of the negative, batch by batch."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from selfnpo.mixing import mix_
from selfnpo.models import PretrainedModel
from selfnpo.progress import progress
from selfnpo.sampling.ddim import ddim_sample, noise_of, plain_guidance


class Method(NamedTuple):
    guidance_scale: float
    beta: float | None = None  # None: plain guidance, or no guidance at a scale of 1


def methods(
    base: PretrainedModel, condition: Tensor, guidance_scales: Sequence[float], betas: Sequence[float]
) -> list[list[Method]]:
    """For each guidance scale: plain guidance, then the negative at each beta."""
    return [
        [Method(plain_guidance(base, condition, scale)[0]), *(Method(scale, beta) for beta in betas)]
        for scale in guidance_scales
    ]


def sweep(
    base: PretrainedModel,
    trained: ModelMixin,
    tuned: ModelMixin | None,
    condition: Tensor,
    wanted: Sequence[Method],
    seed: int = 0,
    alpha: float = 1.0,
    num_inference_steps: int = 25,
    batch_size: int = 1000,
) -> Iterator[tuple[Method, range, Tensor]]:
    """Yield a method, the numbers of its next samples, and these samples `[B, ...]`, until all are done.

    Pass the models in float32 on the host; they are modified. Each is moved to the base's device and dtype when needed, so
    at most one positive and one negative are there at a time. With several betas the originals stay on the host. Plain
    guidance is sampled with the first beta, so that a batch is complete before the next one starts.

    Args:
        trained: theta + delta, the result of training.
        tuned: theta + eta, the positive model; by default the base itself.
        condition: `[n]` for all samples, as in `ddim_sample`. Sample number i starts from the noise of (seed, i).
        alpha: weight of eta in the negatives, see `mix_`.
    """
    batches = [range(first, min(first + batch_size, len(condition))) for first in range(0, len(condition), batch_size)]
    wanted = list(dict.fromkeys(wanted))
    betas = list(dict.fromkeys(method.beta for method in wanted if method.beta is not None))
    keep = deepcopy if len(betas) > 1 else lambda model: model
    positive = None
    with progress(total=len(wanted) * len(batches), desc="compare", unit="batch", leave=False) as bar:
        for beta in betas:
            negative = keep(trained)
            mix_(negative, base.denoiser, tuned, alpha, beta)
            nn.Module.to(negative, base.device, base.dtype)
            positive = positive or nn.Module.to(keep(tuned or base.denoiser), base.device, base.dtype)
            turn = [method for method in wanted if method.beta == beta or (method.beta is None and beta == betas[0])]
            for batch in batches:
                for method in turn:
                    index = torch.tensor(batch)
                    model = positive if method.beta is None else negative
                    options = method.guidance_scale, model, positive, num_inference_steps, batch_size
                    yield method, batch, ddim_sample(base, noise_of(base, index, seed), condition[index], *options)
                    bar.update()
