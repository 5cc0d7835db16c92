"""Rollouts of the reference model, truncated at some time t: where training samples come from.

    name    starts from                    stops at                  reference evaluations per sample
    pool    wherever its trajectory is     after one step            1, and some before the first step
    fresh   noise                          a random grid point       1 .. N, (N + 1) / 2 on average
    full    noise                          the clean sample          N
    data    a noised real image            K steps later             K + 1, fewer near the end

The evaluation that advances a `pool` trajectory by one step is also its Tweedie target. A trajectory that reaches the end
restarts from fresh noise under a new condition.

Positions index the sampling grid: 0 is the noisiest point, N the clean end. An evaluation is one guided evaluation of one
sample; it costs two rows of a batch where the guidance scale is neither 0 nor 1.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from selfnpo.models import PretrainedModel
from selfnpo.randomness import Site, draw_index
from selfnpo.schedule import Grid, step_rows
from selfnpo_kernels import forward_jump, guided_step, philox_normal


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

    def __init__(self, base: PretrainedModel, grid: Grid, guidance_scale: float, micro_batch: int | None = None):
        """`micro_batch`: samples per forward pass; by default all."""
        self.base, self.guidance_scale, self.micro_batch = base, guidance_scale, micro_batch
        self.timesteps, self.rows = grid.timesteps.float(), step_rows(grid)

    def step(self, denoiser: nn.Module, sample: Tensor, position: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(prev_sample, pred_original_sample) at grid `position` `[B]`."""
        parts = zip(
            *(tensor.split(self.micro_batch or len(sample)) for tensor in (sample, position, condition)), strict=True
        )
        stepped = [self._step(denoiser, *part) for part in parts]
        return stepped[0] if len(stepped) == 1 else tuple(map(torch.cat, zip(*stepped, strict=True)))

    def _step(self, denoiser: nn.Module, sample: Tensor, position: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.base.predict_guided(denoiser, sample, self.timesteps[position], condition, self.guidance_scale)
        return guided_step(sample, *outputs, self.guidance_scale, self.base.move(self.rows[position]))

    def roll(self, denoiser: nn.Module, sample: Tensor, start: Tensor, stop: Tensor, condition: Tensor) -> Truncated:
        """Take every sample from grid position `start` to `stop` `[B]`, evaluate it there, and never after."""
        length = stop - start
        order = length.argsort(descending=True)  # so that the samples still under way are always the first ones
        first, asked = start[order], condition[order]
        sample, target = sample[self.base.move(order)], torch.empty_like(sample)
        for k in range(int(length.max()) + 1):
            under_way, moving_on = int((length >= k).sum()), int((length > k).sum())
            prev, target[:under_way] = self.step(denoiser, sample[:under_way], first[:under_way] + k, asked[:under_way])
            sample[:moving_on] = prev[:moving_on]
        back = self.base.move(order.argsort())
        return Truncated(sample[back], target[back], stop, condition, int((length + 1).sum()))


def draw_noise(reference: Reference, seed: int, step: int, ids: Tensor) -> Tensor:
    """x_T of the trajectories `ids` `[B]`."""
    return philox_normal((len(ids), *reference.base.sample_shape), seed, step, Site.START_NOISE, reference.base.move(ids))


def draw_condition(reference: Reference, seed: int, step: int, ids: Tensor) -> Tensor:
    """The conditions that the trajectories `ids` `[B]` follow."""
    return draw_index(0, reference.base.num_conditions, seed, step, Site.CONDITION, ids)


class Rollout(Protocol):
    """What the trainer asks for. `tensors` is all that a checkpoint must hold."""

    tensors: dict[str, Tensor]

    def draw(self, denoiser: nn.Module, step: int) -> Truncated: ...


class TrajectoryPool:
    """`pool_size` batches of trajectories under way, advanced in turn, so that consecutive batches share no trajectory.

    Every batch holds every time of the grid, as evenly as its size allows. Before the first step all trajectories are taken
    to their places, at about (N + 1) / 2 evaluations each. The samples are all the state there is: everything else follows
    from the step.
    """

    def __init__(self, reference: Reference, batch_size: int, seed: int, pool_size: int):
        self.reference, self.seed = reference, seed
        self.length = len(reference.timesteps)
        self.slots = torch.arange(pool_size * batch_size).reshape(batch_size, pool_size).T
        self.first_position = self.slots * self.length // self.slots.numel()
        base = reference.base
        self.tensors = {"sample": torch.zeros(pool_size, batch_size, *base.sample_shape, device=base.device)}

    def draw(self, denoiser: nn.Module, step: int) -> Truncated:
        filling = self._fill(denoiser) if step == 0 else 0
        turn, batch = divmod(step, len(self.slots))
        age = self.first_position[batch] + turn
        generation, position = age // self.length, age % self.length
        ids = generation * self.slots.numel() + self.slots[batch]
        condition = draw_condition(self.reference, self.seed, 0, ids)
        # (0, 1) puts fresh noise in the place of a finished trajectory, (1, 0) leaves the others as they are.
        restart = (position == 0).float()
        rows, keys = (self.reference.base.move(each) for each in (torch.stack((1 - restart, restart), dim=1), ids))
        sample = forward_jump(self.tensors["sample"][batch], rows, self.seed, 0, keys, Site.START_NOISE)
        self.tensors["sample"][batch], target = self.reference.step(denoiser, sample, position, condition)
        return Truncated(sample, target, position, condition, filling + len(sample))

    def _fill(self, denoiser: nn.Module) -> int:
        """Take every trajectory to its first position; returns the evaluations spent."""
        evaluations = 0
        batches = zip(self.tensors["sample"], self.slots, self.first_position, strict=True)
        for sample, ids, position in tqdm(batches, desc="fill pool", total=len(self.slots), leave=False, disable=None):
            noise = draw_noise(self.reference, self.seed, 0, ids)
            condition = draw_condition(self.reference, self.seed, 0, ids)
            rolled = self.reference.roll(denoiser, noise, torch.zeros_like(position), position, condition)
            sample.copy_(rolled.sample)
            evaluations += rolled.evaluations
        return evaluations


class NoiseRollout:
    """From fresh noise to a random grid point (`fresh`), or all the way to a clean sample (`full`)."""

    def __init__(self, reference: Reference, batch_size: int, seed: int, full: bool):
        self.reference, self.seed, self.full = reference, seed, full
        self.ids = torch.arange(batch_size)
        self.tensors = {}

    def draw(self, denoiser: nn.Module, step: int) -> Truncated:
        length, ids = len(self.reference.timesteps), self.ids
        condition = draw_condition(self.reference, self.seed, step, ids)
        noise = draw_noise(self.reference, self.seed, step, ids)
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
        """`images` `[n, ...]` (latents, for a latent model) and their `conditions` `[n]`, both on the CPU."""
        self.reference, self.seed = reference, seed
        self.images, self.conditions, self.num_rollout_steps = images, conditions, num_rollout_steps
        self.rows = torch.stack((grid.alpha[:-1], grid.sigma[:-1]), dim=1).float()  # from a clean image to each grid point
        self.ids = torch.arange(batch_size)
        self.tensors = {}

    def draw(self, denoiser: nn.Module, step: int) -> Truncated:
        length, ids = len(self.reference.timesteps), self.ids
        image = draw_index(0, len(self.images), self.seed, step, Site.IMAGE, ids)
        start = draw_index(0, length, self.seed, step, Site.START, ids)
        clean, rows, keys = (self.reference.base.move(each) for each in (self.images[image], self.rows[start], ids))
        noised = forward_jump(clean, rows, self.seed, step, keys, Site.START_NOISE)
        stop = (start + self.num_rollout_steps).clamp(max=length - 1)
        return self.reference.roll(denoiser, noised, start, stop, self.conditions[image])
