"""Noise schedules as coefficient rows: the only file that knows alphas, sigmas, prediction types and samplers.

A schedule is a pair (alpha_t, sigma_t) with x_t = alpha_t x_0 + sigma_t eps. For every prediction type x_0 and eps are
affine in (sample, model output), and so is a deterministic DDIM step. This file computes those coefficients in float64 and
hands them to the ops of `selfnpo_kernels` as float32 rows.
"""

from dataclasses import dataclass

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from selfnpo.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """All training times of a model, in order of increasing noise; float64, `[T]`."""

    timesteps: Tensor  # what the model receives
    alpha: Tensor
    sigma: Tensor
    prediction_type: str  # epsilon, v_prediction, sample or flow


@dataclass(frozen=True)
class Grid:
    """The N points of a sampling trajectory in order of decreasing noise, and the point after the last; float64."""

    timesteps: Tensor  # [N]
    alpha: Tensor  # [N + 1]
    sigma: Tensor  # [N + 1]
    prediction_type: str


def _sampler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The deterministic sampler for a scheduler. It defines the noise levels."""
    name = type(scheduler).__name__
    if name.startswith("FlowMatch"):
        if scheduler.config.use_dynamic_shifting:
            raise UserError(f"{name} with use_dynamic_shifting has no fixed noise levels; set use_dynamic_shifting to false")
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    if not hasattr(scheduler, "alphas_cumprod"):  # EDM and variance-exploding schedulers
        raise UserError(
            f"{name} has no alphas_cumprod to derive noise levels from; expected a model with a DDPM-like scheduler"
        )
    family = CogVideoXDDIMScheduler if name.startswith("CogVideoX") else DDIMScheduler
    return family.from_config(scheduler.config)


def _prediction_type(sampler: SchedulerMixin) -> str:
    if isinstance(sampler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    prediction_type = sampler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"prediction_type is {prediction_type!r}; expected epsilon, v_prediction or sample")
    if prediction_type == "epsilon" and sampler.alphas_cumprod[-1] <= 0:
        raise UserError("prediction_type epsilon cannot recover x_0 at zero terminal SNR; use v_prediction or sample")
    return prediction_type


def make_schedule(scheduler: SchedulerMixin) -> Schedule:
    """All times of a diffusers scheduler, such as `pipe.scheduler`.

    The noise levels are the scheduler's own (any beta schedule, zero terminal SNR, CogVideoX's SNR shift,
    flow-matching shift). Clipping and thresholding of x_0 are ignored because they are not affine.
    """
    sampler = _sampler(scheduler)
    if isinstance(sampler, FlowMatchEulerDiscreteScheduler):
        sigma = sampler.sigmas.double().flip(0)
        return Schedule(sampler.timesteps.double().flip(0), 1 - sigma, sigma, "flow")
    alphas_cumprod = sampler.alphas_cumprod.double()
    timesteps = torch.arange(len(alphas_cumprod), dtype=torch.float64)
    return Schedule(timesteps, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), _prediction_type(sampler))


def make_grid(scheduler: SchedulerMixin, num_inference_steps: int) -> Grid:
    """The sampling trajectory with `num_inference_steps` points, as the scheduler's configuration defines it.

    Raises:
        UserError: the steps do not divide the training timesteps evenly.
    """
    sampler = _sampler(scheduler)
    total = sampler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= total or total % num_inference_steps:
        divisors = [n for n in range(10, 101) if total % n == 0]
        raise UserError(
            f"num_inference_steps is {num_inference_steps}; expected a divisor of the {total} training timesteps, "
            f"for example one of {divisors}"
        )
    sampler.set_timesteps(num_inference_steps)
    timesteps = sampler.timesteps.double()
    if isinstance(sampler, FlowMatchEulerDiscreteScheduler):
        sigma = sampler.sigmas.double()
        return Grid(timesteps, 1 - sigma, sigma, "flow")
    alphas_cumprod = torch.cat((sampler.alphas_cumprod[sampler.timesteps], sampler.final_alpha_cumprod.reshape(1))).double()
    return Grid(timesteps, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), _prediction_type(sampler))


def _x0_coefficients(alpha: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(p, q) with x_0 = p x + q m."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {
        "epsilon": (1 / alpha, -sigma / alpha),
        "v_prediction": (alpha, -sigma),
        "sample": (zero, one),
        "flow": (one, -sigma),
    }[prediction_type]


def _epsilon_coefficients(alpha: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(p, q) with eps = p x + q m."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {
        "epsilon": (zero, one),
        "v_prediction": (sigma, alpha),
        "sample": (1 / sigma, -alpha / sigma),
        "flow": (one, 1 - sigma),
    }[prediction_type]


def step_rows(grid: Grid) -> Tensor:
    """(p0, q0, p1, q1) of `guided_step` from every grid point to the next: float32 `[N, 4]`."""
    alpha, sigma = grid.alpha[:-1], grid.sigma[:-1]
    p0, q0 = _x0_coefficients(alpha, sigma, grid.prediction_type)
    pe, qe = _epsilon_coefficients(alpha, sigma, grid.prediction_type)
    next_alpha, next_sigma = grid.alpha[1:], grid.sigma[1:]
    return torch.stack((p0, q0, next_alpha * p0 + next_sigma * pe, next_alpha * q0 + next_sigma * qe), dim=1).float()


def jump_rows(schedule: Schedule, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of `forward_jump` from K given times t to every training time s, and the first s that is noisier than t.

    Args:
        alpha_t, sigma_t: float64 `[K]`.

    Returns:
        rows, float32 `[K, T, 2]`, meaningful for s >= first; first, int64 `[K]`, equal to T if no s is noisier.
    """
    first = torch.searchsorted(schedule.sigma, sigma_t, right=True)
    ratio = schedule.alpha / alpha_t[:, None]
    carried = ratio * sigma_t[:, None]
    # The product form is exact near s = t, where the difference of squares cancels.
    variance = (schedule.sigma - carried) * (schedule.sigma + carried)
    rows = torch.stack((ratio, variance.clamp(min=0).sqrt()), dim=-1)
    later = torch.arange(len(schedule.sigma)) >= first[:, None]
    return torch.where(later[..., None], rows, rows.new_tensor([1.0, 0.0])).float(), first


def loss_rows(schedule: Schedule, weighting: str) -> Tensor:
    """(p, q, k) of `x0_loss` at every training time: float32 `[T, 3]`.

    "x0" compares x_0 itself (k = 1), as the paper writes it. "epsilon" weights the difference by alpha / sigma, so that it
    is measured in units of the noise; its coefficients stay finite where alpha or sigma vanishes.
    """
    p, q = _x0_coefficients(schedule.alpha, schedule.sigma, schedule.prediction_type)
    if weighting == "x0":
        return torch.stack((p, q, torch.ones_like(p)), dim=1).float()
    weight = schedule.alpha / schedule.sigma
    # eps = (x - alpha x_0) / sigma, hence weight * x_0 = x / sigma - eps.
    pe, qe = _epsilon_coefficients(schedule.alpha, schedule.sigma, schedule.prediction_type)
    return torch.stack((1 / schedule.sigma - pe, -qe, weight), dim=1).float()
