"""The demo's base model, and the command that made the weights in selfnpo/demo/weights.

python -m selfnpo.demo.base --output_dir selfnpo/demo/weights --overwrite

A class-conditional DiT with a single patch, the whole 8x8 image: a residual network with 436 thousand parameters. It is
deliberately small, so that it trains in a minute on a CPU and makes visible mistakes, as every large model does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selfnpo.cli import parse, run
from selfnpo.errors import UserError
from selfnpo.options import Split
from selfnpo.output import prepare_output
from selfnpo.progress import progress

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

NULL_LABEL = 10


@dataclass(frozen=True)
class BaseConfig:
    """Train the demo's base model on one half of the digits."""

    output_dir: Path
    """Folder for transformer/ and scheduler/."""
    overwrite: bool = False
    """Replace an earlier model in output_dir."""
    split: Split = "final"
    """final: train on half A, like the packaged model. development: train on half B, for choosing settings."""
    max_train_steps: int = 3000
    """Optimizer steps."""
    seed: int = 0
    """Seed of initialisation, batches and noise."""


def make_scheduler() -> DDIMScheduler:
    from diffusers import DDIMScheduler  # imported here so that --help does not load PyTorch

    return DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing", clip_sample=False)


def train_base(split: Split, steps: int, seed: int) -> DiTTransformer2DModel:
    """Train with ordinary denoising and label dropout, and return the exponential moving average of the weights."""
    import torch
    from diffusers import DiTTransformer2DModel
    from torch.nn import functional as F

    from selfnpo.inputs.digits import halves
    from selfnpo.schedule import make_schedule

    digits, _ = halves(split)
    schedule = make_schedule(make_scheduler())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=8, in_channels=1,
            out_channels=1, num_embeds_ada_norm=NULL_LABEL, norm_num_groups=1,
        )  # fmt: skip
        model.eval()  # diffusers' own label dropout is off; the null label is drawn below
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
        for step in progress(range(steps), desc="base", unit="step"):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100)
            batch, t = torch.randint(len(digits.labels), (128,)), torch.randint(1000, (128,))
            noise, images = torch.randn(128, 1, 8, 8), digits.images[batch]
            alpha, sigma = (c[t].float()[:, None, None, None] for c in (schedule.alpha, schedule.sigma))
            labels = torch.where(torch.rand(128) < 0.1, NULL_LABEL, digits.labels[batch])
            output = model(alpha * images + sigma * noise, t, class_labels=labels, return_dict=False)[0]
            F.mse_loss(output, noise).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_([*average.parameters()], [p.detach() for p in model.parameters()], 1 - decay)
    return average


def main(config: BaseConfig) -> None:
    if config.max_train_steps < 1:
        raise UserError(f"max_train_steps is {config.max_train_steps}; expected a positive number, such as 3000")
    prepare_output(config.output_dir, ("transformer", "scheduler"), config.overwrite)
    from selfnpo.files import committed_folder

    model = train_base(config.split, config.max_train_steps, config.seed)
    for name, part in (("transformer", model), ("scheduler", make_scheduler())):
        with committed_folder(config.output_dir / name) as folder:
            part.save_pretrained(folder)
    print(f"base model: {config.output_dir}")


def command(args: Sequence[str] | None = None) -> None:
    main(parse(BaseConfig, args))


if __name__ == "__main__":
    run(command)
