"""Only the kernels: train a small denoiser on points in two rings, then sample it with classifier-free guidance.

python examples/kernels_alone.py
"""

import argparse
import math

import torch
from torch import nn

from selfnpo_kernels import forward_jump, fused_adamw_, guided_step, philox_normal, x0_loss

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=2000)
args = parser.parse_args()

# A schedule of 50 times: x_t = alpha x_0 + sigma eps, time 0 the cleanest.
angle = torch.linspace(0.02, math.pi / 2 - 0.02, 50)
alpha, sigma = angle.cos(), angle.sin()


class Denoiser(nn.Module):
    """eps from x_t `[B, 2]`, the time and the ring: 0, 1, or 2 for "no condition"."""

    def __init__(self):
        super().__init__()
        self.ring = nn.Embedding(3, 16)
        self.layers = nn.Sequential(nn.Linear(19, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x, time, ring):
        return self.layers(torch.cat((x, angle[time, None], self.ring(ring)), dim=1))


torch.manual_seed(0)
model, batch = Denoiser(), 512
params = [*model.parameters()]
exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
ids, lr = torch.arange(batch), torch.tensor([1e-3])
for step in range(1, args.steps + 1):
    ring, time, turn = torch.randint(2, (batch,)), torch.randint(50, (batch,)), 2 * math.pi * torch.rand(batch)
    x_0 = torch.stack((turn.cos(), turn.sin()), dim=1) * (1 + ring[:, None])
    noised = torch.stack((alpha[time], sigma[time]), dim=1)  # x_t = alpha x_0 + sigma noise
    x_t = forward_jump(x_0, noised, seed=0, step=step, sample_ids=ids)
    seen = torch.where(torch.rand(batch) < 0.2, 2, ring)
    estimate = torch.stack((1 / alpha[time], -sigma[time] / alpha[time]), dim=1)  # x_0 = (x_t - sigma eps) / alpha
    weight = alpha[time] / sigma[time]  # so that errors count as errors of eps
    rows = torch.cat((estimate, torch.ones(batch, 1)), dim=1) * weight[:, None]
    loss = x0_loss(model(x_t, time, seen), x_t, x_0, rows)
    grads = torch.autograd.grad(loss, params)
    fused_adamw_(params, list(grads), exp_avgs, exp_avg_sqs, step=torch.tensor([step]), lr=lr)
    if step % 500 == 0 or step == args.steps:
        print(f"step {step}: loss {loss.item():.3f}")

ring = torch.arange(batch) % 2
x = philox_normal((batch, 2), seed=1, step=0, site=0, sample_ids=ids)
with torch.no_grad():
    for now in range(49, 0, -1):
        time, before = torch.full((batch,), now), now - 1
        cond, uncond = model(x, time, ring), model(x, time, torch.full_like(ring, 2))
        p, q = 1 / alpha[now], -sigma[now] / alpha[now]
        keep = sigma[before] / sigma[now]  # DDIM: x_s = alpha_s x_0 + sigma_s eps, with eps = (x - alpha x_0) / sigma
        share = alpha[before] - keep * alpha[now]
        row = torch.stack((p, q, keep + share * p, share * q))
        x, _ = guided_step(x, cond, uncond, 1.5, row.expand(batch, 4))
inner, outer = (x[ring == number].norm(dim=1).mean() for number in (0, 1))
print(f"mean radius of ring 0: {inner:.2f}, of ring 1: {outer:.2f}; trained on 1 and 2")
