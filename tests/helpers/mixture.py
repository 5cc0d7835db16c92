"""A Gaussian mixture in the plane: a diffusion model whose posterior mean is known in closed form."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from selfnpo.models import Conditions, PretrainedModel
from selfnpo.models.class_conditional import ClassConditional
from selfnpo.schedule import make_schedule

SCHEDULER = DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing")  # nearly pure noise at its end
MEANS = torch.tensor([[1.5, 0.5], [-1.0, 1.2], [0.0, -1.6]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.3


def draw_x0(count: int, generator: torch.Generator) -> Tensor:
    component = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return MEANS[component] + STD * torch.randn(count, 2, generator=generator, dtype=torch.float64)


class ExactDenoiser(nn.Module):
    """Predicts epsilon exactly; `linear`, zero at first, is a direction in which a student could leave the optimum."""

    def __init__(self):
        super().__init__()
        self.schedule = make_schedule(SCHEDULER)
        self.linear = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def posterior_mean(self, sample: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t] for `sample` `[B, 2]` at (alpha, sigma) `[B, 1]`."""
        variance = alpha**2 * STD**2 + sigma**2
        distance = (sample[:, None] - alpha[:, None] * MEANS).square().sum(-1)
        responsibility = (WEIGHTS.log() - distance / (2 * variance)).softmax(1)
        centres = MEANS + (alpha * STD**2 / variance)[:, None] * (sample[:, None] - alpha[:, None] * MEANS)
        return (responsibility[..., None] * centres).sum(1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        t = timestep.long()
        alpha, sigma = self.schedule.alpha[t][:, None], self.schedule.sigma[t][:, None]
        sample = sample.double()
        epsilon = (sample - alpha * self.posterior_mean(sample, alpha, sigma)) / sigma
        features = torch.cat((sample, torch.ones_like(alpha)), dim=1)
        return (epsilon + features @ self.linear.T,)


def exact_model() -> PretrainedModel:
    """Two conditions that mean the same; the last is the null condition."""
    return PretrainedModel(
        ClassConditional(), ExactDenoiser(), SCHEDULER, Conditions(1, {"class_labels": torch.arange(2)}, {}), (2,)
    )
