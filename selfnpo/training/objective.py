"""Truncated diffusion fine-tuning: from truncated rollouts to a loss.

x_s is diffused from x_t, never from the target. The target is a mean over many possible x_0, and a noised mean would lie
outside the model's own distribution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from selfnpo.models import PretrainedModel
from selfnpo.randomness import Site, draw_index
from selfnpo.schedule import Grid, Schedule, jump_rows, loss_rows
from selfnpo.training.rollout import RolloutBatch
from selfnpo_kernels import forward_jump, philox_uniform, x0_loss


@dataclass(frozen=True)
class StudentBatch:
    """The student's inputs, and the coefficients of its loss."""

    sample: Tensor  # x_s [B, ...]
    timesteps: Tensor  # [B]
    condition: Tensor  # [B]
    rows: Tensor  # coefficients of x0_loss, [B, 3]


class TruncatedObjective:
    """|| target - f_theta(x_s, s, c) ||^2, or its Huber form, with s drawn uniformly from the times noisier than t."""

    def __init__(
        self,
        base: PretrainedModel,
        schedule: Schedule,
        grid: Grid,
        *,
        kind: str,
        weighting: str,
        huber_c: float,
        condition_dropout: float,
        seed: int,
    ):
        self.base, self.kind, self.huber_c, self.condition_dropout = base, kind, huber_c, condition_dropout
        self.timesteps = schedule.timesteps.float().to(base.device)
        # Position N is the clean sample (alpha 1, sigma 0), where `full` rollouts end.
        alpha = torch.cat((grid.alpha[:-1], grid.alpha.new_ones(1)))
        sigma = torch.cat((grid.sigma[:-1], grid.sigma.new_zeros(1)))
        self.jump_rows, self.first = (table.to(base.device) for table in jump_rows(schedule, alpha, sigma))
        self.loss_rows = loss_rows(schedule, weighting).to(base.device)
        self.seed, self.seed_on_host = (torch.full((1,), seed, device=device) for device in (base.device, "cpu"))
        self._times, self._dropped = self.times, self.dropped

    def compile(self) -> None:
        """Compile the random draws, which are many small operations on few numbers."""
        self._times, self._dropped = (torch.compile(each, dynamic=False) for each in (self.times, self.dropped))

    @torch.no_grad()
    def jump(self, batch: RolloutBatch, step: Tensor) -> StudentBatch:
        """x_s and everything that goes with it. `step`, one int64 number on the device of the conditions, keys the noise."""
        ids, step_here = batch.ids(self.base.device), self.base.move(step)
        timesteps, jump_rows, loss_rows = self._times(self.base.move(batch.position), step_here, ids)
        x_s = forward_jump(batch.sample, jump_rows, self.seed, step_here, ids, Site.JUMP_NOISE)
        condition = self._dropped(batch.condition, step, batch.ids(batch.condition.device))
        return StudentBatch(x_s, timesteps, condition, loss_rows)

    def times(self, position: Tensor, step: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps s `[B]`, drawn for grid `position` `[B]`, with the coefficient rows of the jump and of the loss."""
        first, last = self.first[position], len(self.timesteps)
        s = draw_index(first, last, self.seed, step, Site.JUMP_TIME, ids)
        # No time is noisier than the noisiest: such a trajectory only advances, and its loss row is all zeros.
        trainable = first < last
        s = torch.where(trainable, s, last - 1)
        return self.timesteps[s], self.jump_rows[position, s], self.loss_rows[s] * trainable[:, None]

    def dropped(self, condition: Tensor, step: Tensor, ids: Tensor) -> Tensor:
        """Conditions `[B]`, some replaced by the null condition. All arguments are on the device of the conditions."""
        seed = self.seed if condition.device == self.seed.device else self.seed_on_host
        is_dropped = philox_uniform(seed, step, Site.DROPOUT, ids) < self.condition_dropout
        return torch.where(is_dropped, self.base.null_condition, condition)

    def loss(self, asked: StudentBatch, model_output: Tensor, target: Tensor) -> Tensor:
        """The mean over the batch."""
        return x0_loss(model_output, asked.sample, target, asked.rows, self.kind, self.huber_c)
