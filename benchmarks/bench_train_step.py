"""Training steps: by rollout mode, and a pool against a loop that does what the released code does.

pytest benchmarks/bench_train_step.py --benchmark-only
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.measure import interleaved, quartiles
from benchmarks.released_loop import ReleasedLoop
from selfnpo.config import TrainConfig
from selfnpo.meter import seconds_of
from selfnpo.models import Conditions, PretrainedModel, default_device, load_pretrained
from selfnpo.models.stable_diffusion import StableDiffusion
from selfnpo.trainer import Trainer

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
ROUNDS = 20 if ON_GPU else 9
PROMPTS = 16


@pytest.mark.parametrize("rollout", ["pool", "data", "fresh", "full"])
def bench_train_step(benchmark, rollout):
    trainer = Trainer(TrainConfig(rollout=rollout), load_pretrained())
    trainer.train_step()
    filling = trainer.state.reference_evaluations
    benchmark.group = "training step, demo, batch 128"
    benchmark.pedantic(trainer.train_step, warmup_rounds=3, rounds=20)
    samples = (trainer.state.step - 1) * trainer.config.train_batch_size
    benchmark.extra_info["reference_evaluations_per_sample"] = (trainer.state.reference_evaluations - filling) / samples


def demo() -> PretrainedModel:
    return load_pretrained(device=DEVICE, weights_device=DEVICE)


def unet(side: int = 64) -> PretrainedModel:
    """A UNet with random weights for latents of `side` x `side`: SD1.5's in bf16 on a GPU; on a CPU two of its levels, a
    tenth as wide."""
    torch.manual_seed(0)
    cross, dtype = (768, torch.bfloat16) if ON_GPU else (32, torch.float32)
    small = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    with DEVICE:
        model = UNet2DConditionModel(sample_size=side, cross_attention_dim=cross, **({} if ON_GPU else small))
    model = model.to(dtype).eval().requires_grad_(False)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    rows = torch.randn(PROMPTS + 1, 77, cross, device=DEVICE, dtype=dtype)
    conditions = Conditions(PROMPTS, {"encoder_hidden_states": rows}, {})
    return PretrainedModel(StableDiffusion(), model, scheduler, conditions, (4, side, side), DEVICE, dtype)


MODELS = {"demo, batch 128": (demo, 128), "demo, batch 1024": (demo, 1024)}
if ON_GPU:
    MODELS["SD1.5, batch 20"] = unet, 20
else:
    MODELS |= {f"UNet, {side}x{side}, batch 20": (partial(unet, side), 20) for side in (16, 32)}


@pytest.mark.parametrize("name", MODELS)
def bench_against_the_released_loop(benchmark, name):
    make, batch_size = MODELS[name]
    config = TrainConfig(train_batch_size=batch_size, pool_size=2, lr_warmup_steps=0, max_train_steps=10**6)
    loops = {
        "released": partial(ReleasedLoop, config),
        "pool": partial(Trainer, config),
        "pool, compiled": partial(Trainer, replace(config, compile=True)),
    }
    benchmark.group = f"training step, {name}"
    timers, seconds, startup = {}, {}, {}
    for arm, loop in loops.items():
        timers[arm], startup[arm] = warmed_up(loop(make()))
        if ON_GPU:  # one after the other: the activations of three loops fill more than one GPU
            seconds[arm] = [timers[arm]() for _ in range(ROUNDS)]
            if arm != "pool, compiled":
                del timers[arm]
                gc.collect()
                torch.cuda.empty_cache()
    if not ON_GPU:
        seconds = interleaved(timers, ROUNDS)
    benchmark.pedantic(timers["pool, compiled"], rounds=ROUNDS)
    measured = {arm: quartiles(values) for arm, values in seconds.items()}
    middle = {arm: values[1] for arm, values in measured.items()}
    ratios = (f"{middle['released'] / middle[arm]:.2f}" for arm in ("pool", "pool, compiled"))
    benchmark.extra_info |= {"seconds": measured, "startup_seconds": startup}
    benchmark.extra_info["training"] = name, *(f"{value * 1e3:.3g}" for value in middle.values()), *ratios


def warmed_up(loop: ReleasedLoop | Trainer) -> tuple[Callable[[], float], float | None]:
    """A function that takes a step and returns its seconds, to its end on the device; and what starting took."""
    timed = partial(seconds_of, loop.train_step, DEVICE)
    for _ in range(8):  # compiled, watched, captured
        timed()
    return timed, loop.state.startup_seconds if isinstance(loop, Trainer) else None
