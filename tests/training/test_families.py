"""Training on every family, full weights and LoRA: it learns, resumes exactly, and keeps its reference."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from fixed_batch import losses_on_a_fixed_batch
from runs import FAMILIES, RANKS, assert_same_state, settings, start
from selfnpo.inputs.data import read_data
from selfnpo.models import ModelOptions, Source, load_pretrained


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_on_a_fixed_batch(models, family, rank):
    rate = 5e-2 if rank else 2e-3
    config = settings(models(family), rank=rank, learning_rate=rate, rollout_guidance_scale=3.0, rollout="fresh", seed=1)
    losses = losses_on_a_fixed_batch(start(config), 25)
    assert losses[-1] < 0.85 * losses[0], losses


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_resume_is_exact(models, tmp_path, family, rank):
    config = settings(models(family), rank=rank)
    straight = start(config, tmp_path / "straight")
    straight.run()
    broken = start(config, tmp_path / "broken")
    while broken.state.step < 2:
        broken.train_step()
    broken._checkpoint()
    broken.writer.wait()
    resumed = start(replace(config, resume_from_checkpoint="latest"), tmp_path / "broken")
    assert resumed.state.step == 2
    resumed.run()
    assert_same_state(straight, resumed)
    assert any("reference_model" in name for name in resumed.state.tensors())


@pytest.mark.parametrize("family", FAMILIES)
def test_with_lora_the_reference_is_the_base_bitwise_and_held_once(models, family):
    config = settings(models(family), rank=2, reference_decay=1.0, learning_rate=1e-2)
    plain, trainer = load_pretrained(ModelOptions(str(models(family)))), start(config)
    while trainer.state.step < 3:
        trainer.train_step()
    state, student = trainer.state, trainer.state.student
    sample, time = torch.randn(2, *plain.sample_shape), torch.full((2,), 300.0)
    condition = torch.tensor([0, plain.null_condition])
    with torch.no_grad():
        expected = plain.predict(plain.denoiser, sample, time, condition)
        assert plain.predict(student.reference, sample, time, condition).equal(expected)
        assert state.base.predict(state.base.denoiser, sample, time, condition).equal(expected)
        assert not plain.predict(student.model, sample, time, condition).equal(expected)
        assert plain.predict(student.reference, sample, time, condition).equal(expected)
    held = {parameter.data_ptr() for parameter in state.base.denoiser.parameters()}
    assert len(held) == len([*plain.denoiser.parameters()]) + len(student.trainable)
    assert not student.averaged


def test_the_relative_delta_of_a_lora_is_that_of_the_merged_weights(models):
    trainer = start(settings(models("unconditional"), rank=2, lora_alpha=6, learning_rate=1e-2))  # convolutions too
    while trainer.state.step < 3:
        trainer.train_step()
    theta = load_pretrained(ModelOptions(str(models("unconditional")))).denoiser
    pairs = [*zip(trainer.state.student.merged().parameters(), theta.parameters(), strict=True)]
    delta = torch.stack([(now - old).norm() for now, old in pairs]).norm()
    norm = torch.stack([old.norm() for _, old in pairs]).norm()
    assert trainer.state.relative_delta() == pytest.approx((delta / norm).item(), rel=1e-3)


def test_compiled_lora_training_is_the_same_training(models):
    config = settings(models("class_conditional"), rank=2)
    plain, compiled = start(config), start(replace(config, compile=True))
    for _ in range(3):
        assert compiled.train_step()[0].item() == pytest.approx(plain.train_step()[0].item(), rel=1e-3)
    assert any(module._compiled_call_impl for module in compiled.state.student.networks()[0].modules())


@pytest.mark.parametrize(("rollout", "used"), [("pool", 4 + 1), ("fresh", 2 * 4)])
def test_no_more_prompts_are_encoded_than_can_be_drawn(models, tmp_path, capsys, rollout, used):
    (tmp_path / "prompts.txt").write_text("".join(f"cat number {number}\n" for number in range(100)))
    config = settings(models("stable_diffusion"), prompts=str(tmp_path / "prompts.txt"), rollout=rollout)
    prompts = read_data(config, Source(config)).prompts
    assert prompts == [f"cat number {index * 100 // used}" for index in range(used)]
    assert f"note: only {used} of the 100 prompts are used" in capsys.readouterr().out
    assert len(read_data(replace(config, max_train_steps=1000), Source(config)).prompts) == 100


@pytest.mark.parametrize("family", ["stable_diffusion", "unconditional"])
def test_the_released_recipe_starts_from_an_image_folder(models, tmp_path, family):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.effect_noise((80, 70 + number), 90).convert("RGB").save(images / f"{number}.png")
    (images / "0.txt").write_text("a cat")
    config = settings(models(family), rollout="data", train_data_dir=images, num_rollout_steps=2)
    trainer = start(config)
    first = trainer.train_step()[0]
    assert first.isfinite()
    rollout = trainer.state.rollout
    assert rollout.images.shape == (3, *trainer.state.base.sample_shape)
    assert rollout.conditions.tolist() == ([0, 1, 1] if family == "stable_diffusion" else [1, 1, 1])
    assert trainer.state.base.num_conditions == (2 if family == "stable_diffusion" else 1)
    if family == "stable_diffusion":
        assert read_data(config, Source(config)).prompts == ["a cat", ""]
