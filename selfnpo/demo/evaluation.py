"""Paired comparison of negative models on the digits: same noise, labels and guidance, different negatives.

A replicate is one seed. It fine-tunes its own negative (unless one is given) and draws its own noise, which all its arms
share. Means, differences from plain guidance and their intervals are computed over replicates.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from scipy import stats
from torch import nn

from selfnpo.demo.config import CFG, NONE
from selfnpo.demo.metrics import Metrics
from selfnpo.models import PretrainedModel
from selfnpo.progress import progress
from selfnpo.sampling.ddim import ddim_sample, start_noise


@dataclass(frozen=True)
class Estimate:
    """Mean over replicates, and half the width of its 95 % interval (Student's t), which is NaN for a single replicate."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        n = len(values)
        half_width = stats.t.ppf(0.975, n - 1) * stats.sem(values) if n > 1 else math.nan
        return cls(sum(values) / n, float(half_width))

    def __format__(self, sign: str) -> str:
        """Mean ± half width, the latter with two significant digits; f"{difference:+}" shows a plus sign."""
        decimals = min(max(1 - math.floor(math.log10(self.half_width)), 0), 5) if self.half_width > 0 else 3
        mean = f"{self.mean:{sign}.{decimals}f}"
        return mean if math.isnan(self.half_width) else f"{mean} ± {self.half_width:.{decimals}f}"

    def holds_zero(self) -> bool:
        """Whether the printed interval contains 0, so that the sign of the mean is undecided."""
        mean, _, half_width = f"{self}".partition(" ± ")
        return not half_width or abs(float(mean)) <= float(half_width)


@dataclass(frozen=True)
class Evaluation:
    """values[arm][guidance_scale] contains one dictionary of metrics per replicate."""

    values: dict[str, dict[float, list[dict[str, float]]]]
    num_samples: int
    seeds: tuple[int, ...]

    def estimate(self, arm: str, guidance_scale: float, metric: str) -> Estimate:
        return Estimate.of([row[metric] for row in self.values[arm][guidance_scale]])

    def difference(
        self, arm: str, guidance_scale: float, metric: str, baseline: str = CFG, baseline_scale: float | None = None
    ) -> Estimate:
        """`arm` minus `baseline`, by default at the same scale, paired by replicate."""
        pairs = zip(self.values[arm][guidance_scale], self.values[baseline][baseline_scale or guidance_scale], strict=True)
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
        negatives: the negative models by arm, for each seed; may be a generator that trains them on demand.
        num_samples: per arm, guidance scale and seed; labels are balanced.
    """
    labels = torch.arange(num_samples) % base.num_conditions
    values: dict[str, dict[float, list[dict[str, float]]]] = {}

    def measure(arm: str, guidance_scale: float, seed: int, negative: nn.Module) -> None:
        samples = ddim_sample(base, start_noise(base, num_samples, seed), labels, guidance_scale, negative)
        values.setdefault(arm, {}).setdefault(guidance_scale, []).append(metrics(samples.cpu(), labels))

    for number, (seed, models) in enumerate(zip(seeds, negatives, strict=True), start=1):
        arms = {CFG: base.denoiser} | models
        todo = [(NONE, 1.0, base.denoiser)]
        todo += [(arm, scale, negative) for arm, negative in arms.items() for scale in guidance_scales]
        done = progress(todo, desc=f"judge, seed {number} of {len(seeds)}", unit="set", leave=False)
        for arm, guidance_scale, negative in done:
            measure(arm, guidance_scale, seed, negative)
    return Evaluation(values, num_samples, seeds)


def load(path: Path) -> Evaluation:
    """Load an evaluation.json from `python -m selfnpo.evaluate`."""
    content = json.loads(path.read_text())
    values = {arm: {float(scale): rows for scale, rows in found.items()} for arm, found in content["values"].items()}
    return Evaluation(values, content["num_samples"], tuple(content["seeds"]))
