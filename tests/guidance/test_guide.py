"""guide(pipe, negative) on plain diffusers pipelines: what it computes."""

from copy import deepcopy
from types import MethodType
from unittest.mock import patch

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from fine_tunes import changed
from pipelines import CASES, CLOSE, SD, Case, denoiser_of, load, save_lora
from selfnpo import guide
from selfnpo.errors import UserError
from selfnpo.models.lora.read import LORA_FILE

TWO_CALLS = {"SDXL, modular", "Wan", "CogView4", "Qwen-Image"}
LORA_CASES = [
    "text to image",
    "SDXL",
    "ControlNet",
    "IP-Adapter",
    "AnimateDiff",
    "Stable Diffusion 3",
    "T2I-Adapter",
    "CogVideoX",
    "CogVideoX, image to video",
    "Wan",
    "SDXL, modular",
]


@pytest.mark.parametrize("name", CASES)
def test_the_negative_answers_its_half(models, name):
    case = CASES[name]
    pipe = case.pipe(models)
    plain, denoiser = case.run(pipe), denoiser_of(pipe)
    negative = changed(denoiser)
    with guide(pipe, deepcopy(denoiser)) as guidance:
        same = case.run(pipe)
    assert guidance.evaluations > 0
    with guide(pipe, negative):
        guided = case.run(pipe)
    assert case.run(pipe).equal(plain)  # detached
    if name in TWO_CALLS | {"DDPM", "DDIM"}:
        assert same.equal(plain)  # batches are as they were, so that it is bitwise
    torch.testing.assert_close(same, plain, **CLOSE)
    assert (guided - plain).abs().max() > 0.01

    denoiser.forward = MethodType(both_on_the_whole_batch(name, type(denoiser).forward, negative), denoiser)
    torch.testing.assert_close(guided, case.run(pipe), **CLOSE)


def both_on_the_whole_batch(name, forward, negative):
    """The same without splitting anything: both models see everything, then rows are chosen."""
    calls = []

    def chosen(self, *args, **kwargs):
        lists = deepcopy({key: value for key, value in kwargs.items() if isinstance(value, list)})  # which a UNet empties
        positive = forward(self, *args, **kwargs)
        output = forward(negative, *args, **kwargs | lists)
        calls.append(0)
        if name in TWO_CALLS:
            return output if len(calls) % 2 == 0 else positive
        if name in ("DDPM", "DDIM"):
            return type(output)(sample=2 * positive.sample - output.sample)
        tensors = (positive, output) if isinstance(output, tuple) else ((positive.sample,), (output.sample,))
        own, theirs = (each[0] for each in tensors)
        half = len(own) // 2
        rows = torch.cat((own[:half], theirs[half:]) if name == "DiT" else (theirs[:half], own[half:]))
        return (rows,) if isinstance(output, tuple) else type(output)(sample=rows)

    return chosen


def test_it_is_the_loop_written_out_by_hand(models):
    pipe = load(models(SD), StableDiffusionPipeline)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    negative, scale = changed(pipe.unet), 4.0
    with guide(pipe, negative):
        guided = pipe(
            "a cat", num_inference_steps=5, guidance_scale=scale, output_type="latent", generator=torch.manual_seed(0)
        )

    cond, null = pipe.encode_prompt("a cat", "cpu", 1, True)
    sample = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    pipe.scheduler.set_timesteps(5)
    with torch.no_grad():
        for time in pipe.scheduler.timesteps:
            positive_eps, negative_eps = pipe.unet(sample, time, cond).sample, negative(sample, time, null).sample
            eps = scale * positive_eps - (scale - 1) * negative_eps
            sample = pipe.scheduler.step(eps, time, sample).prev_sample
    torch.testing.assert_close(guided.images, sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LORA_CASES)
def test_a_lora_is_its_merged_twin(models, tmp_path, name):
    case = CASES[name]
    pipe = case.pipe(models)
    plain = case.run(pipe)
    lora, twin = save_lora(tmp_path, pipe)
    with guide(pipe, lora):
        side_by_side = case.run(pipe)
    with guide(pipe, twin):
        in_turn = case.run(pipe)
    assert case.run(pipe).equal(plain)
    assert (in_turn - plain).abs().max() > 0.01
    torch.testing.assert_close(side_by_side, in_turn, **CLOSE)


def test_a_lora_of_zeros_is_bitwise_plain(models, tmp_path):
    case = CASES["text to image"]
    pipe = case.pipe(models)
    plain, (lora, _) = case.run(pipe), save_lora(tmp_path, pipe)
    weights = load_file(lora / LORA_FILE)
    save_file(
        {key: tensor if "lora_A" in key else tensor * 0 for key, tensor in weights.items()}, tmp_path / "zero.safetensors"
    )
    with guide(pipe, tmp_path / "zero.safetensors"):
        assert case.run(pipe).equal(plain)


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_alpha_and_beta(models, tmp_path, kind):
    """theta + alpha eta + beta delta against theta + eta, from models and from LoRAs."""
    case = CASES["text to image"]
    pipe = case.pipe(models)
    theta = deepcopy(pipe.unet)
    if kind == "whole":
        negative, positive = changed(theta, 1), changed(theta, 2)
        given = negative, positive
    else:
        given, (negative, positive) = zip(*(save_lora(tmp_path / str(seed), pipe, seed) for seed in (1, 2)), strict=True)
    with guide(pipe, given[0], alpha=0.25, beta=0.5, positive=given[1]):
        guided = case.run(pipe)
    mixed = deepcopy(theta)
    for weight, n, p in zip(mixed.parameters(), negative.parameters(), positive.parameters(), strict=True):
        weight.data += 0.25 * (p.data - weight.data) + 0.5 * (n.data - weight.data)
    pipe.unet.load_state_dict(positive.state_dict())
    with guide(pipe, mixed):
        torch.testing.assert_close(guided, case.run(pipe), **CLOSE)


def test_folders_ids_files_and_modules(models, tmp_path, put_in_cache):
    case: Case = CASES["text to image"]
    pipe = case.pipe(models)
    negative = changed(pipe.unet)
    negative.save_pretrained(tmp_path / "negative")
    put_in_cache(tmp_path / "negative", "someone/negative")
    whole = type(pipe)(**{**pipe.components, "unet": negative}, requires_safety_checker=False)
    whole.save_pretrained(tmp_path / "pipeline")
    results = []
    for origin in (negative, str(tmp_path / "negative"), tmp_path / "pipeline", "someone/negative"):
        with guide(pipe, origin):
            results.append(case.run(pipe))
    assert all(result.equal(results[0]) for result in results)
    put_in_cache(save_lora(tmp_path / "lora", pipe)[0], "someone/lora")
    with guide(pipe, "someone/lora"):
        from_hub = case.run(pipe)
    with guide(pipe, tmp_path / "lora"):
        assert case.run(pipe).equal(from_hub)
    assert not from_hub.equal(results[0])


def test_two_calls_without_cache_contexts(models):
    """Pipelines that say nothing of their second call."""
    pipe = CASES["CogView4"].pipe(models)
    plain, negative = CASES["CogView4"].run(pipe), changed(pipe.transformer)
    with guide(pipe, negative):
        expected = CASES["CogView4"].run(pipe)
    pipe.transformer.cache_context = lambda name, **kwargs: torch.no_grad()
    with guide(pipe, negative, mode="alternate"):
        assert CASES["CogView4"].run(pipe).equal(expected)
    assert not expected.equal(plain)


def test_extrapolation_has_a_scale(models):
    pipe = CASES["DDPM"].pipe(models)
    negative, results = changed(pipe.unet), []
    for scale in (1.5, 2.0, None):
        with guide(pipe, negative, guidance_scale=scale):
            results.append(CASES["DDPM"].run(pipe))
    assert not results[0].equal(results[1])
    assert results[1].equal(results[2])


@pytest.mark.parametrize("name", ["text to image", "CogVideoX", "DiT", "DDPM", "Wan", "SDXL, modular"])
def test_values_are_looked_at_once_a_run(models, name):
    """In every further step the host waits for nothing."""
    case = CASES[name]
    pipe = case.pipe(models)
    guidance = guide(pipe, changed(denoiser_of(pipe)))
    with guidance, patch.object(guidance.branches, "prepare", wraps=guidance.branches.prepare) as prepare:
        case.run(pipe)
        case.run(pipe)
    assert prepare.call_count == 2


def test_a_callback_may_end_guidance(models, caplog):
    """As diffusers' documentation shows it, to save time in the last steps."""
    case = CASES["text to image"]
    pipe = case.pipe(models)

    def end(pipe, step, time, tensors):
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    negative, call = (
        changed(pipe.unet),
        {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    )
    plain = case.run(pipe, **call)
    with guide(pipe, negative) as guidance:
        shorter = case.run(pipe, **call)
        assert guidance.evaluations == 2
        assert "the negative has no effect from here on" in caplog.text
        assert not case.run(pipe).equal(shorter)
    assert not shorter.equal(plain)


def test_a_prompt_alone_is_no_guidance(models):
    """Two samples from equal noise without guidance look like a doubled batch, and are none."""
    pipe = CASES["CogVideoX"].pipe(models)
    noise = torch.randn(1, 2, 4, 8, 8, generator=torch.manual_seed(0)).repeat(2, 1, 1, 1, 1)
    call = {"prompt": ["a cat", "a dog"], "latents": noise}
    with guide(pipe, changed(pipe.transformer)) as guidance:
        with pytest.raises(UserError, match=r"guidance_scale is 1.0: the negative would do nothing"):
            CASES["CogVideoX"].run(pipe, **call, guidance_scale=1.0)
        assert guidance.evaluations == 0
        CASES["CogVideoX"].run(pipe, **call)
