"""What users get wrong with guide(pipe, negative): one sentence, and the pipeline as it was."""

from copy import deepcopy

import pytest
import torch
from diffusers import (
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)  # fmt: skip
from safetensors.torch import load_file, save_file

from fine_tunes import changed
from pipelines import CASES, load, save_lora
from selfnpo import guide
from selfnpo.errors import UserError

CASE = CASES["text to image"]


@pytest.fixture
def refused(pipe):
    """Asserts that a negative is refused in one sentence and that the pipeline has nothing of it."""

    def check(negative, sentence, given=pipe, **options):
        denoiser = getattr(given, "unet", None)
        before = None if denoiser is None else dict(vars(denoiser))
        with pytest.raises(UserError) as raised:
            guide(given, negative, **options)
        message = str(raised.value)
        assert sentence in message
        assert "\n" not in message
        assert before is None or dict(vars(denoiser)) == before

    return check


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": 1.5}, "beta is 1.5; expected a value from 0 to 1 (force=True allows any finite value)"),
        ({"beta": -0.1}, "beta is -0.1; expected"),
        ({"beta": float("nan")}, "beta is nan; expected"),
        ({"beta": float("inf"), "force": True}, "beta is inf; expected"),
        ({"alpha": 2}, "alpha is 2; expected"),
        ({"alpha": 0.5}, "alpha is 0.5, but it scales the offset of a positive; pass positive="),
        ({"mode": "twice"}, "mode is 'twice'; expected 'auto' or 'alternate'"),
        ({"guidance_scale": 7.5}, "StableDiffusionPipeline takes guidance_scale in its own call; pass it there"),
    ],
)
def test_options(refused, pipe, options, sentence):
    refused(deepcopy(pipe.unet), sentence, **options)


def test_force_allows_more(pipe):
    negative = changed(pipe.unet)
    expected = deepcopy(pipe.unet)
    for weight, moved in zip(expected.parameters(), negative.parameters(), strict=True):
        weight.data += 1.5 * (moved.data - weight.data)
    with guide(pipe, negative, beta=1.5, force=True):
        further = CASE.run(pipe)
    with guide(pipe, expected):
        torch.testing.assert_close(further, CASE.run(pipe), rtol=0, atol=1e-4)


def test_other_architectures(refused, pipe, tmp_path, models):
    wider = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 48})
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight is [16, 48], expected [16, 32]"
    refused(wider, f"the UNet2DConditionModel has a different architecture than the base: {first}")
    wider.save_pretrained(tmp_path / "wider")
    refused(tmp_path / "wider", f"wider has a different architecture than the base: {first}")
    refused(
        load(models("stable_diffusion_xl")).unet,
        "has a different architecture than the base: add_embedding.linear_1.bias is",
    )
    refused(models("cogvideox"), "contains neither config.json nor unet/config.json")


def test_what_is_not_there(refused, tmp_path):
    refused("nobody/nothing", "nobody/nothing was not found locally or on the hub")
    refused(tmp_path / "absent.safetensors", "absent.safetensors does not exist; expected a .safetensors file, a folder or")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    refused(tmp_path / "broken.safetensors", "broken.safetensors could not be read as safetensors")
    refused("negative.ckpt", "negative.ckpt")


def test_loras_of_others(refused, pipe, tmp_path):
    lora = load_file(save_lora(tmp_path, pipe)[0] / "pytorch_lora_weights.safetensors")
    renamed = {key.replace("down_blocks", "elsewhere"): tensor for key, tensor in lora.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    refused(tmp_path / "renamed.safetensors", "renamed.safetensors is a LoRA for another base")
    infinite = {key: tensor * (torch.inf if "conv1" in key else 1) for key, tensor in lora.items()}
    save_file(infinite, tmp_path / "infinite.safetensors")
    refused(tmp_path / "infinite.safetensors", "infinite.safetensors contains weights that are inf or NaN, such as unet.")
    text = {key.replace("unet.", "text_encoder."): tensor for key, tensor in lora.items()}
    save_file(text, tmp_path / "text.safetensors")
    refused(tmp_path / "text.safetensors", "changes nothing in the unet; expected a LoRA for this model family")


def test_pipelines_that_guide_otherwise(refused, pipe):
    parts = {**pipe.components, "requires_safety_checker": False}
    negative = deepcopy(pipe.unet)
    three = StableDiffusionInstructPix2PixPipeline(**parts)
    refused(negative, "StableDiffusionInstructPix2PixPipeline guides with three branches", three)
    refused(negative, "StableDiffusionPAGPipeline guides with perturbed attention", StableDiffusionPAGPipeline(**parts))


def test_a_pipeline_without_denoiser(refused, pipe):
    negative = pipe.unet
    empty = StableDiffusionPipeline(**{**pipe.components, "unet": None}, requires_safety_checker=False)
    refused(
        negative, "StableDiffusionPipeline has neither a unet nor a transformer; expected a pipeline with a denoiser", empty
    )


def test_extrapolation_below_one(refused, models):
    pipe = CASES["DDPM"].pipe(models)
    refused(pipe.unet, "guidance_scale is 1.0: the negative would do nothing; use a value above 1", pipe, guidance_scale=1.0)


def test_guidance_that_is_off(pipe):
    with guide(pipe, changed(pipe.unet)):
        with pytest.raises(UserError, match=r"guidance_scale is 1.0: the negative would do nothing"):
            CASE.run(pipe, guidance_scale=1.0)
        CASE.run(pipe)  # and goes on


def test_a_negative_that_is_never_used(pipe):
    plain, before = CASE.run(pipe), dict(vars(pipe.unet))
    with pytest.raises(UserError, match="was attached to StableDiffusionPipeline and never used"), guide(pipe, pipe.unet):
        pass
    guidance = guide(pipe, changed(pipe.unet))
    with pytest.raises(UserError, match="never used"):
        guidance.detach()
    assert dict(vars(pipe.unet)) == before
    assert CASE.run(pipe).equal(plain)


def test_attaching_twice(pipe):
    negative = changed(pipe.unet)
    with guide(pipe, negative) as guidance:
        expected = CASE.run(pipe)
        for attach in (guidance.attach, lambda: guide(pipe, negative)):
            with pytest.raises(UserError, match="the unet of this StableDiffusionPipeline already has a negative"):
                attach()
        assert CASE.run(pipe).equal(expected)


def test_what_would_make_the_branches_wrong(pipe, tmp_path):
    """Said when the pipeline runs, with what to do; afterwards it runs."""
    negative, (lora, _) = changed(pipe.unet), save_lora(tmp_path, pipe)
    with guide(pipe, negative):
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        with pytest.raises(UserError, match=r"a LoRA is fused into .*; call pipe.unfuse_lora\(\)"):
            CASE.run(pipe)
        pipe.unfuse_lora()
        CASE.run(pipe)
    pipe.unload_lora_weights()
    for given in (negative, lora):
        with guide(pipe, given):
            pipe.fuse_qkv_projections()
            with pytest.raises(
                UserError, match=r"the fused projections of .* bypass the negative; call pipe.unfuse_qkv_projections\(\)"
            ):
                CASE.run(pipe)
            pipe.unfuse_qkv_projections()
            CASE.run(pipe)


def test_weights_for_a_quantised_denoiser(refused, pipe):
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    negative = changed(pipe.unet)
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    refused(negative, "of the unet is quantised, but the negative's weights are not; use a LoRA")


def test_dora_is_no_low_rank_offset(refused, pipe, tmp_path):
    twin = deepcopy(pipe.unet)
    twin.add_adapter(tiny_dora())
    twin.save_lora_adapter(tmp_path)
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    save_file({f"unet.{key}": tensor for key, tensor in weights.items()}, tmp_path / "dora.safetensors")
    refused(tmp_path / "dora.safetensors", "more than low-rank offsets (DoRA or biases); merge it into a full model first")


def tiny_dora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["to_q"], use_dora=True)
