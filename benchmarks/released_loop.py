"""A training step as the authors' released code takes it, to compare with; what it computes, not how it loads data.

Six steps of the reference, each for the prompt and for the null prompt, of which the sixth gives the target; every sample is
evaluated to the end, also one that is finished. Noise from torch.randn, the formulas in eager PyTorch, clipping, AdamW and
the average one after the other, and the loss read by the host in every step. Substituted: latents are random instead of
encoded images, AdamW is PyTorch's default instead of one in 8 bits, and on a CPU float32 stands for float16 under autocast.
"""

import copy

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from selfnpo.config import TrainConfig
from selfnpo.models import PretrainedModel
from selfnpo.schedule import make_grid, make_schedule

GUIDANCE_SCALE = 0.0  # w = -1
DECAY, HUBER_C, STEPS = 0.999, 1e-3, 5


class ReleasedLoop:
    def __init__(self, config: TrainConfig, base: PretrainedModel):
        self.base, self.batch_size = base, config.train_batch_size
        self.model = copy.deepcopy(base.denoiser).to(base.device, torch.float32).requires_grad_(True)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=1e-3)
        grid, schedule = make_grid(base.scheduler, 25), make_schedule(base.scheduler)
        self.grid_times = grid.timesteps.long()
        self.alpha, self.sigma = (
            torch.cat((of_times.float(), end)).to(base.device)
            for of_times, end in ((schedule.alpha, torch.ones(1)), (schedule.sigma, torch.zeros(1)))
        )  # the last entry is the clean end

    def predict(
        self, network: nn.Module, sample: torch.Tensor, times: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        return self.base.predict(network, sample, times.float(), condition).float()

    def at(self, table: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return table[times.to(table.device)][:, None, None, None]

    def train_step(self) -> float:
        base, batch = self.base, self.batch_size
        condition = torch.randint(base.num_conditions, (batch,))
        null, end = torch.full_like(condition, base.null_condition), len(self.alpha) - 1
        start = torch.randint(len(self.grid_times), (batch,))
        path = torch.cat((self.grid_times, torch.full((STEPS + 1,), end)))
        t = path[start]
        clean = torch.randn(batch, *base.sample_shape, device=base.device)
        x = self.at(self.alpha, t) * clean + self.at(self.sigma, t) * torch.randn_like(clean)
        with torch.no_grad():
            for k in range(STEPS + 1):
                now, following = path[start + k], path[start + k + 1]
                asked = now.clamp(max=end - 1)
                both = self.predict(
                    self.reference, torch.cat((x, x)), torch.cat((asked, asked)), torch.cat((null, condition))
                )
                uncond, cond = both.chunk(2)
                epsilon = uncond + GUIDANCE_SCALE * (cond - uncond)
                x_0 = (x - self.at(self.sigma, now) * epsilon) / self.at(self.alpha, now)
                if k < STEPS:
                    moved = self.at(self.alpha, following) * x_0 + self.at(self.sigma, following) * epsilon
                    x = torch.where((now == end).to(x.device)[:, None, None, None], x, moved)
                    t = following
            t = t.clamp(max=end - 2)
            s = t + 1 + (torch.rand(batch) * (end - 1 - t)).long()
            ratio = self.at(self.alpha, s) / self.at(self.alpha, t)
            spread = (self.at(self.sigma, s) ** 2 - (ratio * self.at(self.sigma, t)) ** 2).clamp(min=0).sqrt()
            x_s = ratio * x + spread * torch.randn_like(x)
        epsilon = self.predict(self.model, x_s, s, condition)
        student_x_0 = (x_s - self.at(self.sigma, s) * epsilon) / self.at(self.alpha, s)
        loss = (torch.sqrt((student_x_0 - x_0) ** 2 + HUBER_C**2) - HUBER_C).mean()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(self.reference.parameters(), self.model.parameters(), strict=True):
                average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)
        return loss.item()
