"""One guided evaluation of a UNet, with a negative model and without: what `guide` costs over plain guidance.

On a GPU it is SD1.5's UNet in bf16; on a CPU one half as wide, in float32. Latents are 64 x 64; weights are random.

pytest benchmarks/bench_guidance.py --benchmark-only
"""

from copy import deepcopy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

from benchmarks.measure import interleaved, quartiles, timer
from selfnpo import guide
from selfnpo_kernels import cfg_combine

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
NAME = "SD1.5's UNet, bf16, 64x64" if ON_GPU else "half as wide as SD1.5's UNet, float32, 64x64"
WIDTHS, CROSS, RANK, SIDE = ((320, 640, 1280, 1280), 768, 64, 64) if ON_GPU else ((160, 320, 640, 640), 384, 32, 64)
ROUNDS = 30 if ON_GPU else 5
SCALE = 7.5


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(block_out_channels=WIDTHS, cross_attention_dim=CROSS, attention_head_dim=8)
    return model.eval().requires_grad_(False).to(DEVICE, DTYPE)


@pytest.fixture(scope="module")
def lora(unet, tmp_path_factory):
    """For the attention projections."""
    folder, twin = tmp_path_factory.mktemp("lora"), sharing(unet)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    twin.add_adapter(LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(twin))
    return folder


def sharing(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet of its own on the same weights."""
    return deepcopy(unet, {id(weight): weight for weight in unet.parameters()})


def pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(None, None, None, sharing(unet), scheduler, None, None, requires_safety_checker=False)


@pytest.mark.parametrize("batch_size", [1, 4, 20] if ON_GPU else [1, 2])
@torch.no_grad()
def bench_guided_evaluation(benchmark, unet, lora, batch_size):
    sample = torch.randn(batch_size, 4, SIDE, SIDE, device=DEVICE, dtype=DTYPE)
    null, cond = torch.randn(2, batch_size, 77, CROSS, device=DEVICE, dtype=DTYPE)
    both, time = torch.cat((null, cond)), torch.tensor(500, device=DEVICE)

    def guided_by(pipe):
        return lambda: cfg_combine(pipe.unet(torch.cat((sample, sample)), time, both).sample, SCALE)

    negative = deepcopy(unet)

    def two_calls():
        eps_pos, eps_neg = unet(sample, time, cond).sample, negative(sample, time, null).sample
        return SCALE * eps_pos - (SCALE - 1) * eps_neg

    plain, whole, low_rank = (pipeline(unet) for _ in range(3))
    arms = {"plain": guided_by(plain), "whole": guided_by(whole), "LoRA": guided_by(low_rank), "two calls": two_calls}
    with guide(whole, negative), guide(low_rank, lora):
        timers = {name: timer(function, DEVICE) for name, function in arms.items()}
        seconds = {name: quartiles(values) for name, values in interleaved(timers, ROUNDS).items()}
        benchmark.pedantic(timers["whole"], rounds=ROUNDS)
    middle = {name: values[1] for name, values in seconds.items()}
    benchmark.extra_info["seconds"] = seconds
    ratios = (f"{middle[name] / middle['plain']:.2f}" for name in ("whole", "LoRA", "two calls"))
    benchmark.extra_info["guidance"] = NAME, batch_size, f"{middle['plain'] * 1e3:.3g}", *ratios
    benchmark.group = f"guided evaluation, {NAME}, batch {batch_size}"
