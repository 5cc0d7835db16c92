"""Arithmetic on weights: theta_neg = theta + alpha eta + beta delta."""

import copy

import torch
from diffusers import ModelMixin


def mix(
    base: ModelMixin, negative: ModelMixin, positive: ModelMixin | None = None, alpha: float = 1.0, beta: float = 1.0
) -> ModelMixin:
    """A negative model of chosen strength, as Diffusion-NPO combines them.

    Args:
        base: theta.
        negative: theta + delta, the result of the training.
        positive: theta + eta, a preference-optimised or otherwise fine-tuned model that shall be the positive one.
        alpha: share of eta in [0, 1]; 1 keeps what positive and negative have in common, so that it cancels.
        beta: share of delta in [0, 1].
    """
    mixed = copy.deepcopy(base)
    theta = [*base.parameters()]
    with torch.no_grad():
        for model, share in ((positive, alpha), (negative, beta)):
            if model is not None:
                torch._foreach_add_([*mixed.parameters()], torch._foreach_sub([*model.parameters()], theta), alpha=share)
    return mixed
