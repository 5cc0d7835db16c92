"""Truncated diffusion fine-tuning: from truncated rollouts to a loss.

x_s is diffused from x_t and never from the target: the target is a mean over many possible x_0, and noising a mean would
leave the model's own distribution.
"""

import torch
from torch import Tensor, nn

from selfnpo.models import PretrainedModel
from selfnpo.randomness import Site, draw_index
from selfnpo.rollout import Truncated
from selfnpo.schedule import Grid, Schedule, jump_rows, loss_rows
from selfnpo_kernels import forward_jump, philox_uniform, x0_loss


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
        self.base, self.kind, self.huber_c = base, kind, huber_c
        self.condition_dropout, self.seed = condition_dropout, seed
        self.timesteps = schedule.timesteps.float()
        # Position N is the clean sample (alpha 1, sigma 0), where full rollouts end.
        alpha = torch.cat((grid.alpha[:-1], grid.alpha.new_ones(1)))
        sigma = torch.cat((grid.sigma[:-1], grid.sigma.new_zeros(1)))
        self.jump_rows, self.first = jump_rows(schedule, alpha, sigma)
        self.loss_rows = loss_rows(schedule, weighting)

    def __call__(self, denoiser: nn.Module, batch: Truncated, step: int, part: slice = slice(None)) -> Tensor:
        """The mean loss of one batch, or of a part of it; `step` keys its noise."""
        ids = torch.arange(len(batch.sample))[part]
        position, sample = batch.position[part], batch.sample[part]
        first, last = self.first[position], len(self.timesteps)
        s = draw_index(first, last, self.seed, step, Site.JUMP_TIME, ids)
        # The noisiest time has no noisier one: such a trajectory only advances, its loss is an ordinary row of zeros.
        trainable = first < last
        s = torch.where(trainable, s, last - 1)
        move = self.base.move
        x_s = forward_jump(sample, move(self.jump_rows[position, s]), self.seed, step, move(ids), Site.JUMP_NOISE)
        dropped = philox_uniform(self.seed, step, Site.DROPOUT, ids) < self.condition_dropout
        condition = torch.where(dropped, self.base.null_condition, batch.condition[part])
        model_output = self.base.predict(denoiser, x_s, self.timesteps[s], condition)
        rows = move(self.loss_rows[s] * trainable[:, None])
        return x0_loss(model_output, x_s, batch.target[part], rows, self.kind, self.huber_c)
