"""Arithmetic on weights: theta_neg = theta + alpha eta + beta delta."""

import torch
from diffusers import ModelMixin


@torch.no_grad()
def mix_(
    negative: ModelMixin, base: ModelMixin, positive: ModelMixin | None = None, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """Give a negative model the strength that is wanted, in place, as Diffusion-NPO combines them.

    Args:
        negative: theta + delta, the result of the training; afterwards theta + alpha eta + beta delta.
        base: theta.
        positive: theta + eta, a preference-optimised or otherwise fine-tuned model that shall be the positive one.
        alpha: share of eta in [0, 1]; 1 keeps what positive and negative have in common, so that it cancels.
        beta: share of delta in [0, 1].
    """
    theta = [*base.parameters()]
    torch._foreach_lerp_([*negative.parameters()], theta, 1 - beta)
    if positive is not None:
        for mixed, tuned, original in zip(negative.parameters(), positive.parameters(), theta, strict=True):
            mixed.add_(tuned - original, alpha=alpha)
