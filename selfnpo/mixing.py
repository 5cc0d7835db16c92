"""Arithmetic on weights: theta_neg = theta + alpha eta + beta delta."""

import torch
from diffusers import ModelMixin
from torch import Tensor


def mixed(theta: Tensor, negative: Tensor, positive: Tensor | None, alpha: float, beta: float) -> Tensor:
    """One weight of theta + alpha eta + beta delta: exactly `negative` at beta = 1, `theta` at 0, theta - k delta at -k.

    Args:
        theta, negative, positive: weights of the same shape: theta, theta + delta, theta + eta.
    """
    result = theta.lerp(negative, beta)
    return result if positive is None else result.add_(positive - theta, alpha=alpha)


def same_weights(one: ModelMixin, other: ModelMixin) -> bool:
    return all(weight.equal(its) for weight, its in zip(one.parameters(), other.parameters(), strict=True))


@torch.no_grad()
def mix_(
    negative: ModelMixin, base: ModelMixin, positive: ModelMixin | None = None, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """Set the strength of a negative model in place, combining weights as Diffusion-NPO does.

    Args:
        negative: theta + delta, the result of training; becomes theta + alpha eta + beta delta.
        base: theta.
        positive: theta + eta, a preference-optimised or otherwise fine-tuned model, used as the positive.
        alpha: weight of eta in [0, 1]. At 1 the negative contains all of eta, as the positive does, so eta cancels.
        beta: weight of delta in [0, 1].
    """
    theta = [*base.parameters()]
    tuned = [None] * len(theta) if positive is None else positive.parameters()
    for weight, original, other in zip(negative.parameters(), theta, tuned, strict=True):
        weight.copy_(mixed(original, weight, other, alpha, beta))
