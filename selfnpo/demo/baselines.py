"""Baseline negatives for the demo. They show how much any weaker model would gain as the negative."""

import copy

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from selfnpo.inputs.digits import Digits
from selfnpo.randomness import Site, draw_index
from selfnpo.training.rollout import Rollout, RolloutBatch
from selfnpo_kernels import philox_normal


def random_perturbation(base: ModelMixin, negative: ModelMixin, seed: int) -> ModelMixin:
    """Move the base in a random direction, each parameter tensor as far as fine-tuning moved it."""
    perturbed = copy.deepcopy(base)
    with torch.no_grad():
        for index, (theta, trained) in enumerate(zip(perturbed.parameters(), negative.parameters(), strict=True)):
            ids = torch.zeros(1, dtype=torch.int64, device=theta.device)
            noise = philox_normal((1, theta.numel()), seed, index, Site.PERTURBATION, ids).reshape(theta.shape)
            theta += noise * ((trained - theta).norm() / noise.norm())
    return perturbed


class ShuffledLabels(Rollout):
    """Ordinary diffusion training on real images with random labels: a rollout that never evaluates a model."""

    def __init__(self, digits: Digits, batch_size: int, seed: int, num_inference_steps: int):
        self.digits, self.seed = digits, seed
        self.ids = torch.arange(batch_size)
        self.position = torch.full((batch_size,), num_inference_steps)  # the clean end of the grid
        self.tensors: dict[str, Tensor] = {}

    def draw(self, denoiser: nn.Module, step: Tensor) -> RolloutBatch:
        image = draw_index(0, len(self.digits.images), self.seed, step, Site.IMAGE, self.ids)
        label = draw_index(0, 10, self.seed, step, Site.CONDITION, self.ids)
        images = self.digits.images[image].to(next(denoiser.parameters()).device)
        return RolloutBatch(images, images, self.position, label, 0)
