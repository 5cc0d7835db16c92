"""Arithmetic on weights: theta_neg = theta + alpha eta + beta delta."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from selfnpo.errors import UserError


@dataclass(frozen=True)
class MixOptions:
    """Which models are mixed."""

    negative: Path = Path("runs/demo/negative")
    """Folder, Hugging Face id or file of a trained negative model, full weights or LoRA: theta + delta."""
    positive: Path | None = None
    """Folder, id or file of a fine-tuned positive model, full weights or LoRA: theta + eta. By default the base itself."""
    alpha: float = 1.0
    """Share of eta in the negative: theta + alpha eta + beta delta."""
    force: bool = False
    """Allow alpha and beta outside [0, 1]."""

    def check_shares(self, betas: Sequence[float]) -> None:
        """Raise a UserError if alpha or a beta makes no sense."""
        for name, value in (("alpha", self.alpha), *(("beta", beta) for beta in betas)):
            if not (math.isfinite(value) if self.force else 0 <= value <= 1):
                hint = "a finite number" if self.force else "a value from 0 to 1, or any with --force"
                raise UserError(f"{name} is {value}; expected {hint}")
        if self.alpha != 1 and self.positive is None:
            raise UserError(
                f"alpha is {self.alpha}, but it scales eta and no positive is given; pass --positive or leave --alpha out"
            )


def mixed(theta: Tensor, negative: Tensor, positive: Tensor | None, alpha: float, beta: float) -> Tensor:
    """One weight of theta + alpha eta + beta delta: exactly `negative` at beta = 1, `theta` at 0, theta - k delta at -k.

    Args:
        theta, negative, positive: weights of one shape: theta, theta + delta, theta + eta.
    """
    result = theta.lerp(negative, beta)
    return result if positive is None else result.add_(positive - theta, alpha=alpha)


@torch.no_grad()
def mix_(
    negative: ModelMixin, base: ModelMixin, positive: ModelMixin | None = None, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """Set the strength of a negative model in place, combining weights as Diffusion-NPO does.

    Args:
        negative: theta + delta, the result of training; becomes theta + alpha eta + beta delta.
        base: theta.
        positive: theta + eta, a preference-optimised or otherwise fine-tuned model, used as the positive.
        alpha: share of eta in [0, 1]; 1 keeps all that positive and negative have in common, so that it cancels.
        beta: share of delta in [0, 1].
    """
    theta = [*base.parameters()]
    tuned = [None] * len(theta) if positive is None else positive.parameters()
    for weight, original, other in zip(negative.parameters(), theta, tuned, strict=True):
        weight.copy_(mixed(original, weight, other, alpha, beta))
