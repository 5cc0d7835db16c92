"""Rollouts of the reference model, truncated at some time t: where training samples come from.

    name    starts from                    stops at                  reference evaluations per sample
    pool    wherever its trajectory is     after one step            1
    fresh   noise                          a random grid point       1 .. N, (N + 1) / 2 on average
    full    noise                          the clean sample          N
    data    a noised real image            K steps later             K + 1, fewer near the end

A `pool` trajectory advances by one step per training step; the evaluation that advances it is also its Tweedie target. A
trajectory that reaches the end restarts from fresh noise under a new condition. Trajectories restart at staggered steps,
so that after one sweep of the grid every time is equally present in every batch.

Positions index the sampling grid: 0 is the noisiest point, N the clean end. An evaluation is one guided evaluation of one
sample; it costs two rows of a batch where the guidance scale is neither 0 nor 1.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from selfnpo.models import PretrainedModel
from selfnpo.randomness import Site, draw_index
from selfnpo.schedule import Grid, step_rows
from selfnpo_kernels import forward_jump, guided_step


@dataclass(frozen=True)
class Truncated:
    """A batch of truncated rollouts."""

    sample: Tensor  # x_t [B, ...]
    target: Tensor  # x_{t -> 0}, the reference's estimate of x_0 at x_t
    position: Tensor  # [B] grid position of t
    condition: Tensor  # [B]
    evaluations: int  # guided evaluations of the reference that the batch cost


class Reference:
    """Guided DDIM steps of a reference model along the grid."""

    def __init__(self, base: PretrainedModel, grid: Grid, guidance_scale: float):
        self.base, self.guidance_scale = base, guidance_scale
        self.timesteps, self.rows = grid.timesteps.float(), step_rows(grid)

    def step(self, denoiser: nn.Module, sample: Tensor, position: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(prev_sample, pred_original_sample) at grid `position` `[B]`."""
        outputs = self.base.predict_guided(denoiser, sample, self.timesteps[position], condition, self.guidance_scale)
        return guided_step(sample, *outputs, self.guidance_scale, self.rows[position])

    def roll(self, denoiser: nn.Module, sample: Tensor, start: Tensor, stop: Tensor, condition: Tensor) -> Truncated:
        """Take every sample from grid position `start` to `stop` `[B]`, evaluate it there, and never after."""
        length = stop - start
        order = length.argsort(descending=True)  # so that the samples still under way are always the first ones
        sample, start, condition = sample[order], start[order], condition[order]
        target = torch.empty_like(sample)
        for k in range(int(length.max()) + 1):
            under_way, moving_on = int((length >= k).sum()), int((length > k).sum())
            prev, target[:under_way] = self.step(denoiser, sample[:under_way], start[:under_way] + k, condition[:under_way])
            sample[:moving_on] = prev[:moving_on]
        return Truncated(sample, target, stop[order], condition, int((length + 1).sum()))


class Rollout(Protocol):
    """What the trainer asks for. `tensors` is all that a checkpoint must hold."""

    tensors: dict[str, Tensor]

    def draw(self, denoiser: nn.Module, step: int) -> Truncated: ...


class TrajectoryPool:
    """B trajectories under way. Their samples are all the state there is: everything else follows from the step."""

    def __init__(self, reference: Reference, batch_size: int, seed: int):
        self.reference, self.seed = reference, seed
        self.tensors = {"sample": torch.zeros(batch_size, *reference.base.sample_shape)}
        self.length = len(reference.timesteps)
        self.stagger = torch.arange(batch_size) * self.length // batch_size

    def draw(self, denoiser: nn.Module, step: int) -> Truncated:
        sample = self.tensors["sample"]
        generation, position = (step + self.stagger) // self.length, (step + self.stagger) % self.length
        position = torch.where(generation == 0, step, position)  # before its first restart it has run since step 0
        ids = generation * len(sample) + torch.arange(len(sample))
        condition = draw_index(0, self.reference.base.num_conditions, self.seed, 0, Site.CONDITION, ids)
        # (0, 1) puts fresh noise in the place of a finished trajectory, (1, 0) leaves the others as they are.
        restart = (position == 0).float()
        sample = forward_jump(sample, torch.stack((1 - restart, restart), dim=1), self.seed, 0, ids, Site.START_NOISE)
        self.tensors["sample"], target = self.reference.step(denoiser, sample, position, condition)
        return Truncated(sample, target, position, condition, len(sample))


class NoiseRollout:
    """From fresh noise to a random grid point (`fresh`), or all the way to a clean sample (`full`)."""

    def __init__(self, reference: Reference, batch_size: int, seed: int, full: bool):
        self.reference, self.seed, self.full = reference, seed, full
        self.ids = torch.arange(batch_size)
        self.tensors = {}

    def draw(self, denoiser: nn.Module, step: int) -> Truncated:
        length, ids = len(self.reference.timesteps), self.ids
        condition = draw_index(0, self.reference.base.num_conditions, self.seed, step, Site.CONDITION, ids)
        zeros = torch.zeros(len(ids), *self.reference.base.sample_shape)
        noise = forward_jump(zeros, torch.tensor([[0.0, 1.0]]).repeat(len(ids), 1), self.seed, step, ids, Site.START_NOISE)
        stop = torch.full_like(ids, length - 1) if self.full else draw_index(0, length, self.seed, step, Site.STOP, ids)
        batch = self.reference.roll(denoiser, noise, torch.zeros_like(ids), stop, condition)
        if self.full:
            return replace(batch, sample=batch.target, position=torch.full_like(ids, length))
        return batch


class DataRollout:
    """From real images at a random grid time, then `num_rollout_steps` steps (K); the released recipe. Not data-free."""

    def __init__(
        self,
        reference: Reference,
        batch_size: int,
        seed: int,
        grid: Grid,
        images: Tensor,
        conditions: Tensor,
        num_rollout_steps: int,
    ):
        """`images` `[n, ...]` (latents, for a latent model) and their `conditions` `[n]`."""
        self.reference, self.seed = reference, seed
        self.images, self.conditions, self.num_rollout_steps = images, conditions, num_rollout_steps
        self.rows = torch.stack((grid.alpha[:-1], grid.sigma[:-1]), dim=1).float()  # from a clean image to each grid point
        self.ids = torch.arange(batch_size)
        self.tensors = {}

    def draw(self, denoiser: nn.Module, step: int) -> Truncated:
        length, ids = len(self.reference.timesteps), self.ids
        image = draw_index(0, len(self.images), self.seed, step, Site.IMAGE, ids)
        start = draw_index(0, length, self.seed, step, Site.START, ids)
        noised = forward_jump(self.images[image], self.rows[start], self.seed, step, ids, Site.START_NOISE)
        stop = (start + self.num_rollout_steps).clamp(max=length - 1)
        return self.reference.roll(denoiser, noised, start, stop, self.conditions[image])
