"""A training step that computes what the authors' released code computes, for comparison. Data loading is left out.

The reference takes six steps, and the sixth gives the target. Each step calls it for the prompt and, separately, for the
null prompt. Every sample is evaluated to the end, even a finished one. Weights are float32 under autocast. Values that vary
per sample are looked up in a loop on the host, noise comes from torch.randn, and formulas run in eager PyTorch. Clipping,
AdamW and a moving average (a Python loop) run one after the other, and the host reads the loss in every step. Substituted:
latents are random instead of encoded images, AdamW is PyTorch's default instead of an 8-bit one, autocast is to bfloat16
instead of float16, and on a CPU there is no autocast, because bfloat16 is no faster there.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from selfnpo.config import TrainConfig
from selfnpo.models import PretrainedModel
from selfnpo.schedule import make_grid, make_schedule
from selfnpo.training.optimizer import FusedAdamW
from selfnpo.training.student import FullStudent, converted

GUIDANCE_SCALE = 0.0  # w = -1: the conditional output has zero weight
DECAY, HUBER_C, STEPS = 0.999, 1e-3, 5


class ReleasedLoop:
    """The loop. Its inefficiencies can be switched off one by one.

    Args:
        dead_calls: evaluate the conditional branch too, in spite of its zero weight.
        host_loops: look up times sample by sample on the host.
        one_pass: use this project's optimizer for clipping, AdamW and moving average, with bfloat16 weights in two halves.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: PretrainedModel,
        *,
        dead_calls: bool = True,
        host_loops: bool = True,
        one_pass: bool = False,
    ):
        self.base, self.batch_size = base, config.train_batch_size
        self.dead_calls, self.host_loops, self.optimizer = dead_calls, host_loops, None
        if one_pass:
            student = FullStudent(config, base)
            self.model, self.reference, self.optimizer = student.model, student.reference, FusedAdamW(config, student)
            self.optimizer.set_rate()
        else:
            self.model, self.reference = (converted(base.denoiser, base.device, torch.float32) for _ in range(2))
            self.model.requires_grad_(True)
            self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=1e-3)
        grid, schedule = make_grid(base.scheduler, 25), make_schedule(base.scheduler)
        self.end = len(schedule.timesteps)
        times = torch.cat((grid.timesteps.long(), torch.full((STEPS + 1,), self.end)))
        self.times, self.alpha, self.sigma = (
            each.to(base.device)
            for each in (
                times,
                torch.cat((schedule.alpha.float(), torch.ones(1))),  # the last entry is the clean end
                torch.cat((schedule.sigma.float(), torch.zeros(1))),
            )
        )
        self.starts = len(grid.timesteps)

    @property
    def evaluations(self) -> int:
        """Evaluations of the reference per sample."""
        return (STEPS + 1) * (2 if self.dead_calls else 1)

    def predict(self, network: nn.Module, sample: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        return self.base.predict(network, sample, times.float(), condition).float()

    def look_up(self, table: Tensor, index: Tensor) -> Tensor:
        """Entries of a table, on the device, shaped to multiply samples."""
        found = torch.stack([table[each] for each in index.tolist()]) if self.host_loops else table[index]
        return found.reshape(-1, *[1] * len(self.base.sample_shape))

    def train_step(self) -> None:
        base, batch, device, end = self.base, self.batch_size, self.base.device, self.end
        condition = torch.randint(base.num_conditions, (batch,), device=device)
        null = torch.full_like(condition, base.null_condition)
        start = torch.randint(self.starts, (batch,), device=device)
        clean = torch.randn(batch, *base.sample_shape, device=device)
        t = self.times[start]
        x = self.look_up(self.alpha, t) * clean + self.look_up(self.sigma, t) * torch.randn_like(clean)
        with torch.no_grad():
            for k in range(STEPS + 1):
                now, following = self.times[start + k], self.times[start + k + 1]
                asked = now.clamp(max=end - 1)
                epsilon = self.predict(self.reference, x, asked, null)
                if self.dead_calls:
                    epsilon = epsilon + GUIDANCE_SCALE * (self.predict(self.reference, x, asked, condition) - epsilon)
                x_0 = (x - self.look_up(self.sigma, now) * epsilon) / self.look_up(self.alpha, now)
                if k < STEPS:
                    moved = self.look_up(self.alpha, following) * x_0 + self.look_up(self.sigma, following) * epsilon
                    done = (now == end).reshape(-1, *[1] * len(base.sample_shape))
                    x, t = torch.where(done, x, moved), following
            t = t.clamp(max=end - 2)
            s = t + 1 + (torch.rand(batch, device=device) * (end - 1 - t)).long()
            ratio = self.look_up(self.alpha, s) / self.look_up(self.alpha, t)
            spread = (self.look_up(self.sigma, s) ** 2 - (ratio * self.look_up(self.sigma, t)) ** 2).clamp(min=0).sqrt()
            x_s = ratio * x + spread * torch.randn_like(x)
        epsilon = self.predict(self.model, x_s, s, condition)
        student_x_0 = (x_s - self.look_up(self.sigma, s) * epsilon) / self.look_up(self.alpha, s)
        loss = (torch.sqrt((student_x_0 - x_0) ** 2 + HUBER_C**2) - HUBER_C).mean()
        loss.backward()
        self.optimize()
        if self.host_loops:
            loss.item()

    def optimize(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            return
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(self.reference.parameters(), self.model.parameters(), strict=True):
                average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)
