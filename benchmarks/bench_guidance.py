"""One guided evaluation of a UNet, with a negative model and without: what `guide` costs over plain guidance.

On a GPU this is SD1.5's UNet in bf16; on a CPU, a UNet a fifth as wide on smaller latents, in float32. Weights are random.

pytest benchmarks/bench_guidance.py --benchmark-only
"""

from copy import deepcopy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

from benchmarks.measure import Failures, in_turns, timers
from benchmarks.workloads import DEVICE, DTYPE, ON_GPU
from selfnpo import guide
from selfnpo.device import matmul_peak
from selfnpo_kernels import cfg_combine

NAME = "SD1.5, 64x64" if ON_GPU else "a fifth as wide as SD1.5, 24x24"
WIDTHS, CROSS, RANK, SIDE = ((320, 640, 1280, 1280), 768, 64, 64) if ON_GPU else ((64, 128, 256, 256), 160, 32, 24)
BUDGET = 2 if ON_GPU else 6  # seconds
SCALE = 7.5


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(block_out_channels=WIDTHS, cross_attention_dim=CROSS, attention_head_dim=8)
    return model.eval().requires_grad_(False).to(DEVICE, DTYPE)


@pytest.fixture(scope="module")
def lora(unet, tmp_path_factory):
    """A LoRA for the attention projections."""
    folder, twin = tmp_path_factory.mktemp("lora"), sharing(unet)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    twin.add_adapter(LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(twin))
    return folder


def sharing(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A separate UNet that shares the weights."""
    return deepcopy(unet, {id(weight): weight for weight in unet.parameters()})


def pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(None, None, None, sharing(unet), scheduler, None, None, requires_safety_checker=False)


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@torch.no_grad()
def bench_guided_evaluation(record, unet, lora, batch_size):
    sample = torch.randn(batch_size, 4, SIDE, SIDE, device=DEVICE, dtype=DTYPE)
    null, cond = torch.randn(2, batch_size, 77, CROSS, device=DEVICE, dtype=DTYPE)
    both, time = torch.cat((null, cond)), torch.tensor(500, device=DEVICE)

    def guided_by(pipe):
        return lambda: cfg_combine(pipe.unet(torch.cat((sample, sample)), time, both).sample, SCALE)

    negative = deepcopy(unet)

    def two_calls():
        eps_pos, eps_neg = unet(sample, time, cond).sample, negative(sample, time, null).sample
        return SCALE * eps_pos - (SCALE - 1) * eps_neg

    failures = Failures()
    plain, whole, low_rank = (pipeline(unet) for _ in range(3))
    arms = {
        "plain": guided_by(plain),
        "two calls": two_calls,
        "LoRA": guided_by(low_rank),
        "full weights": guided_by(whole),
    }
    with guide(whole, negative), guide(low_rank, lora):
        found = timers(arms, DEVICE, failures)
        if not found:
            failures.finish()
        times = in_turns(found, BUDGET)
    row = {f"{name}, ms": times.ms(name) for name in arms} | {
        f"{name}, x": times.ratio(name, "plain") for name in arms if name != "plain"
    }
    row |= {"model": NAME, "batch": batch_size, "noise, %": 100 * times.noise}
    record("guidance", [row], {"matmul FLOP/s": matmul_peak(DEVICE, DTYPE)})
    failures.finish()
