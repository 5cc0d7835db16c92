"""Paired comparison of negative models on the digits: same noise, same labels, same guidance, another negative.

A replicate is one seed: it fine-tunes its own negative (unless one is given) and draws its own noise and labels; all arms
of a replicate share them. Means, differences to plain guidance and their standard errors are taken over replicates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from scipy import stats
from torch import nn
from tqdm import tqdm

from selfnpo.demo.metrics import Metrics
from selfnpo.models import PretrainedModel
from selfnpo.sampling.ddim import ddim_sample, start_noise

NONE, CFG, SELF_NPO = "none", "cfg", "self-npo"
SEEDS = (20, 21, 22)  # of what is reported; settings were chosen with others


@dataclass(frozen=True)
class Estimate:
    """Mean over replicates, its standard error and 95 % interval (Student's t)."""

    mean: float
    error: float
    half_width: float

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        n, mean = len(values), sum(values) / len(values)
        if n == 1:
            return cls(mean, math.nan, math.nan)
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
        return cls(mean, error, float(stats.t.ppf(0.975, n - 1)) * error)


@dataclass(frozen=True)
class Evaluation:
    """values[arm][guidance_scale] holds one dictionary of metrics per replicate."""

    values: dict[str, dict[float, list[dict[str, float]]]]
    num_samples: int
    seeds: tuple[int, ...]

    def estimate(self, arm: str, guidance_scale: float, metric: str) -> Estimate:
        return Estimate.of([row[metric] for row in self.values[arm][guidance_scale]])

    def difference(self, arm: str, guidance_scale: float, metric: str, baseline: str = CFG) -> Estimate:
        """`arm` minus `baseline` at the same scale, paired by replicate."""
        pairs = zip(self.values[arm][guidance_scale], self.values[baseline][guidance_scale], strict=True)
        return Estimate.of([row[metric] - other[metric] for row, other in pairs])

    @property
    def guidance_scales(self) -> list[float]:
        return list(self.values[CFG])


def evaluate(
    base: PretrainedModel,
    metrics: Metrics,
    negatives: Iterable[dict[str, ModelMixin]],
    seeds: tuple[int, ...],
    guidance_scales: tuple[float, ...],
    num_samples: int,
) -> Evaluation:
    """Measure every arm at every guidance scale.

    Args:
        negatives: for each seed, its negative models by arm; may be a generator that trains them on demand.
        num_samples: per arm, guidance scale and seed; labels are balanced.
    """
    labels = torch.arange(num_samples) % base.num_conditions
    values: dict[str, dict[float, list[dict[str, float]]]] = {}

    def measure(arm: str, guidance_scale: float, seed: int, negative: nn.Module) -> None:
        samples = ddim_sample(base, start_noise(base, num_samples, seed), labels, guidance_scale, negative)
        values.setdefault(arm, {}).setdefault(guidance_scale, []).append(metrics(samples.cpu(), labels))

    for seed, models in zip(tqdm(seeds, desc="replicates", disable=None), negatives, strict=True):
        measure(NONE, 1.0, seed, base.denoiser)
        for arm, negative in ({CFG: base.denoiser} | models).items():
            for guidance_scale in guidance_scales:
                measure(arm, guidance_scale, seed, negative)
    return Evaluation(values, num_samples, seeds)
