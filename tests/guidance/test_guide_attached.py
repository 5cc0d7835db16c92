"""guide(pipe, negative) among everything else that people do with a pipeline."""

import gc
import logging
import threading
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from fine_tunes import changed
from pipelines import CASES, CLOSE, IMAGE, save_lora
from selfnpo import guide
from selfnpo.errors import UserError

CASE = CASES["text to image"]
KINDS = ["whole", "lora"]


def state(module: nn.Module) -> dict:
    """What a module consists of: its class and attributes, and those of its layers."""
    return {path: (type(layer), {**vars(layer)}.keys()) for path, layer in module.named_modules()}


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_leaves_nothing(pipe, negative_of, kind):
    plain, before = CASE.run(pipe), state(pipe.unet)
    weights = {name: weight.clone() for name, weight in pipe.unet.named_parameters()}
    objects = [*map(id, pipe.unet.parameters())]
    guidance = guide(pipe, negative_of(kind, pipe))
    guided = CASE.run(pipe)
    guidance.detach()
    assert state(pipe.unet) == before
    assert [*map(id, pipe.unet.parameters())] == objects
    assert all(weight.equal(weights[name]) for name, weight in pipe.unet.named_parameters())
    assert CASE.run(pipe).equal(plain)
    guidance.detach()  # again, which is nothing
    with guidance:  # and attached again
        assert CASE.run(pipe).equal(guided)
    assert CASE.run(pipe).equal(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_detaches_too(pipe, negative_of, kind):
    plain, before = CASE.run(pipe), state(pipe.unet)

    def stop(*arguments):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), guide(pipe, negative_of(kind, pipe)):
        CASE.run(pipe, callback_on_step_end=stop)
    assert state(pipe.unet) == before
    assert CASE.run(pipe).equal(plain)

    handle = pipe.unet.mid_block.register_forward_hook(stop)  # while the negative's weights are in place
    with pytest.raises(RuntimeError, match="stop"), guide(pipe, negative_of(kind, pipe)):
        CASE.run(pipe)
    handle.remove()
    assert CASE.run(pipe).equal(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_components_are_unaffected(pipe, negative_of, kind, tmp_path):
    components = pipe.components
    CASE.run(pipe)  # which leaves traces in the tokenizer
    pipe.save_pretrained(tmp_path / "before")
    with guide(pipe, negative_of(kind, pipe)):
        CASE.run(pipe)
        pipe.save_pretrained(tmp_path / "while")
        assert pipe.components.keys() == components.keys()
        assert all(pipe.components[name] is component for name, component in components.items())
    for path in (tmp_path / "before").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "while" / path.relative_to(tmp_path / "before")).read_bytes()


@pytest.mark.parametrize("when", ["before", "while attached"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_style_lora_stays_on_both_branches(pipe, negative_of, tmp_path, kind, when):
    style = save_lora(tmp_path / "style", pipe, seed=7)[0]
    other = load_like(pipe)
    negative = negative_of(kind, pipe)
    merged = {name: change for name, change in offsets(pipe, style).items()}

    if when == "before":
        pipe.load_lora_weights(style, adapter_name="style")
    with guide(pipe, negative):
        unstyled = CASE.run(pipe)
        if when != "before":
            pipe.load_lora_weights(style, adapter_name="style")
        styled = CASE.run(pipe)
        assert pipe.get_active_adapters() == ["style"]
        pipe.set_adapters("style", 0.5)
        half = CASE.run(pipe)
        pipe.disable_lora()
        without = CASE.run(pipe)
        pipe.enable_lora()
        pipe.unload_lora_weights()
        assert CASE.run(pipe).equal(without)
    if when != "before":
        assert unstyled.equal(without)

    theirs = negative if kind == "whole" else twin_of(other, negative)
    for scale, result in ((1.0, styled), (0.5, half), (0.0, without)):
        base, moved = deepcopy(other.unet), deepcopy(theirs)
        for model in (base, moved):
            for name, weight in model.named_parameters():
                weight.data += scale * merged[name]
        pipe_of_both = load_like(other)
        pipe_of_both.unet = base
        with guide(pipe_of_both, moved):
            torch.testing.assert_close(result, CASE.run(pipe_of_both), **CLOSE)


def load_like(pipe):
    other = StableDiffusionPipeline(**{**pipe.components, "unet": deepcopy(pipe.unet)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def twin_of(pipe, lora):
    other = load_like(pipe)
    other.load_lora_weights(lora)
    other.fuse_lora()
    other.unload_lora_weights()
    return other.unet


def offsets(pipe, lora):
    twin = dict(twin_of(pipe, lora).named_parameters())
    return {name: twin[name].data - weight.data for name, weight in pipe.unet.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_that_share_a_denoiser(pipe, negative_of, kind):
    """The negative sits in the denoiser, and each pipeline says for itself whether it guides."""
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "image": IMAGE, "num_inference_steps": 4, "output_type": "pt"}

    def run(**changes):
        return other(**call, **changes, generator=torch.manual_seed(0)).images

    plain, alone = run(), run(guidance_scale=1.0)
    CASE.run(pipe, guidance_scale=1.0)  # of which the pipeline keeps that it does not guide
    negative = negative_of(kind, pipe)
    with guide(other, negative):
        expected = run()
    with guide(pipe, negative):
        assert run().equal(expected)
        CASE.run(pipe)
        assert run(guidance_scale=1.0).equal(alone)
        with pytest.raises(UserError, match="already has a negative; detach that one first"):
            guide(other, negative)
        assert run().equal(expected)
    assert run().equal(plain)
    assert not expected.equal(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_threads(pipe, negative_of, kind):
    """Two pipelines on one denoiser, one guided by prompts, one without guidance, at once."""
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": deepcopy(pipe.scheduler)}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    wrong = []

    def repeat(mine, expected, **changes):
        for _ in range(5):
            if not CASE.run(mine, **changes).equal(expected):
                wrong.append(changes)

    alone = CASE.run(other, guidance_scale=1.0)
    with guide(pipe, negative_of(kind, pipe)):
        expected = CASE.run(pipe)
        threads = [
            threading.Thread(target=repeat, args=(pipe, expected)),
            threading.Thread(target=repeat, args=(other, alone), kwargs={"guidance_scale": 1.0}),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("when", ["before", "while attached"])
@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloading(pipe, negative_of, kind, offload, when):
    """accelerate's hooks come and go above the negative, or below its layers."""
    negative = negative_of(kind, pipe)
    with guide(pipe, negative):
        expected = CASE.run(pipe)
    plain = CASE.run(pipe)

    def enable():
        if offload == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:  # as enable_sequential_cpu_offload does it, which also does it to text encoders, where it needs a GPU
            cpu_offload(pipe.unet, torch.device("cpu"))

    if when == "before":
        enable()
    with guide(pipe, negative):
        if when != "before":
            enable()
        assert hasattr(pipe.unet, "_hf_hook")
        for _ in range(2):  # a pipeline makes its hooks anew after every run
            assert CASE.run(pipe).equal(expected)
        remove_hook_from_module(pipe.unet, recurse=True)
        assert CASE.run(pipe).equal(expected)
    assert CASE.run(pipe).equal(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_negative_is_moved_with_the_pipeline(pipe, negative_of, kind):
    with guide(pipe, negative_of(kind, pipe)) as guidance:
        latents = torch.randn(2, 4, 8, 8)
        single = CASE.run(pipe, latents=latents)
        pipe.to(torch.float64)
        assert {tensor.dtype for tensor in guidance.branches.tensors()} == {torch.float64}
        torch.testing.assert_close(CASE.run(pipe, latents=latents.double()).float(), single, **CLOSE)


def test_a_given_model_stays_as_it_is(pipe):
    negative = changed(pipe.unet)
    weights = {name: weight.clone() for name, weight in negative.state_dict().items()}
    with guide(pipe, negative):
        pipe.to(torch.float64)
        CASE.run(pipe)
    assert all(weight.equal(weights[name]) for name, weight in negative.state_dict().items())


def test_it_says_once_that_it_is_active(pipe, caplog):
    negative = changed(pipe.unet)
    with caplog.at_level(logging.WARNING, logger="selfnpo"), guide(pipe, negative, beta=0.5):
        assert not caplog.records
        CASE.run(pipe)
        CASE.run(pipe)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["negative UNet2DConditionModel (alpha 1, beta 0.5) is active in StableDiffusionPipeline"]


def test_nothing_is_kept_after_detaching(pipe, negative_of):
    lora = negative_of("lora", pipe)
    guidance = guide(pipe, lora)
    CASE.run(pipe)
    guidance.detach()
    del guidance
    gc.collect()
    sizes = {tuple(tensor.shape) for tensor in load_file(lora / "pytorch_lora_weights.safetensors").values()}
    alive = [each for each in gc.get_objects() if type(each) is torch.Tensor and tuple(each.shape) in sizes]
    assert not alive
