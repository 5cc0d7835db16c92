"""Training on every family, full weights and LoRA: it learns, resumes exactly, and saves what plain diffusers loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from selfnpo.config import TrainConfig, dtype_of
from selfnpo.data import read_data
from selfnpo.models import ModelOptions, Source, load_negative, load_pretrained
from selfnpo.optimizer import moment_bytes
from selfnpo.results import save_negative
from selfnpo.train import load_base
from selfnpo.trainer import Trainer
from selfnpo.validation import save_grid

FAMILIES = [
    "stable_diffusion",
    "stable_diffusion_xl",
    "cogvideox",
    pytest.param("cogvideox_rotary", marks=pytest.mark.slow),
    "unconditional",
    "class_conditional",
]
LORA_FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "cogvideox"]  # of which diffusers loads LoRAs
RANKS = [0, 2]


def settings(folder: Path, **changes) -> TrainConfig:
    short = TrainConfig(
        pretrained_model_name_or_path=str(folder), max_train_steps=4, train_batch_size=2, pool_size=2, lr_warmup_steps=0,
        learning_rate=1e-3, checkpointing_steps=2, logging_steps=1, num_inference_steps=10, mixed_precision="no",
    )  # fmt: skip
    return replace(short, **changes)


def start(config: TrainConfig, output_dir: Path | None = None) -> Trainer:
    if output_dir is not None:
        output_dir.mkdir(exist_ok=True)
        config = replace(config, output_dir=output_dir)
    data = read_data(config, Source(config))
    return Trainer(config, load_base(config, data), output_dir, data=data)


def losses_on_a_fixed_batch(trainer: Trainer, steps: int) -> list[float]:
    student, losses = trainer.state.student, []
    with torch.no_grad():
        batch = trainer.state.rollout.draw(student.reference, 0)
    for _ in range(steps):
        with student.training():
            loss = trainer.objective(student.student, batch, 0)
            loss.backward()
        trainer.state.optimizer.step()
        trainer.state.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


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
    resumed = start(replace(config, resume_from_checkpoint="latest"), tmp_path / "broken")
    assert resumed.state.step == 2
    resumed.run()
    one, other = straight.state.tensors(), resumed.state.tensors()
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert any("reference_model" in name for name in one)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_loads_in_plain_diffusers_and_changes_its_output(models, tmp_path, family, rank):
    trainer = start(settings(models(family), rank=rank, learning_rate=1e-2), tmp_path)
    trainer.run()
    state = trainer.state
    folder = save_negative(state, "completed")

    pipeline = DiffusionPipeline.from_pretrained(models(family))
    component = state.base.family.component
    if rank and family.removesuffix("_rotary") in LORA_FAMILIES:
        pipeline.load_lora_weights(folder)
    else:
        setattr(pipeline, component, state.base.family.denoiser_class.from_pretrained(folder))
    sample, time = torch.randn(2, *state.base.sample_shape), torch.full((2,), 300.0)
    condition = torch.tensor([0, state.base.null_condition])
    with torch.no_grad():
        theirs, ours, base = (
            state.base.predict(model, sample, time, condition)
            for model in (getattr(pipeline, component), state.model, state.base.denoiser)
        )
    change = (ours - base).abs().max()
    assert change > 1e-3 * base.abs().max()
    assert (theirs - ours).abs().max() < 1e-3 * change
    again = load_negative(folder, load_pretrained(state.base.source.options))
    with torch.no_grad():
        assert (state.base.predict(again, sample, time, condition) - ours).abs().max() < 1e-3 * change
    card = (folder / "README.md").read_text()
    for text in ("library_name: diffusers", "alpha = 1, beta = 1", "samples per second", f"rank: {rank}"):
        assert text in card


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


@pytest.mark.parametrize("rank", RANKS)
def test_gradient_checkpointing_and_low_vram_change_nothing(models, rank):
    config = settings(models("stable_diffusion"), rank=rank)
    runs = [start(config), start(replace(config, gradient_checkpointing=True)), start(replace(config, low_vram=True))]
    for _ in range(3):
        losses = [run.train_step()[0].item() for run in runs]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert [run.state.base.denoiser.is_gradient_checkpointing for run in runs] == [False, rank > 0, rank > 0]


@pytest.mark.parametrize("rollout", ["pool", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fresh", "full"))])
def test_accumulated_gradients_are_those_of_the_whole_batch(models, rollout):
    config = settings(models("stable_diffusion"), rollout=rollout, rollout_guidance_scale=2.0, train_batch_size=4)
    whole, parts = start(config), start(replace(config, train_batch_size=1, gradient_accumulation_steps=4))
    for _ in range(3):
        assert parts.train_step()[0].item() == pytest.approx(whole.train_step()[0].item(), rel=1e-4)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_near_float32(models, precision, rank):
    config = settings(models("stable_diffusion"), rank=rank, reference_decay=1.0)
    exact, rough = start(config), start(replace(config, mixed_precision=precision))
    for _ in range(3):
        assert rough.train_step()[0].item() == pytest.approx(exact.train_step()[0].item(), rel=0.1)
    state = rough.state
    assert all(parameter.dtype == torch.float32 for parameter in state.student.trainable.values())
    reference = state.base.denoiser if rank else state.student.reference
    assert next(reference.parameters()).dtype == dtype_of(precision)
    assert state.scaler.is_enabled() == (precision == "fp16")
    assert state.relative_delta() == pytest.approx(exact.state.relative_delta(), rel=0.2)


def test_moments_in_8_bits(models, tmp_path):
    config = settings(models("stable_diffusion"))
    exact, rough = start(config), start(replace(config, use_8bit_adam=True), tmp_path)
    rough.run()
    while exact.state.step < 4:
        exact.train_step()
    assert rough.state.relative_delta() == pytest.approx(exact.state.relative_delta(), rel=0.1)
    names = ("state1", "state2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq")
    for trainer in (exact, rough):
        moments = [tensor for name, tensor in trainer.state.tensors().items() if name.endswith(names)]
        counted = sum(moment_bytes(trainer.config, parameter) for parameter in trainer.parameters)
        assert sum(tensor.nbytes for tensor in moments) == counted
    assert counted < 4 * sum(parameter.numel() for parameter in rough.parameters)  # many are small ones here

    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = start(replace(rough.config, resume_from_checkpoint="latest"), tmp_path)
    assert resumed.state.step == 2
    resumed.run()
    one, other = rough.state.tensors(), resumed.state.tensors()
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_an_overflow_in_float16_leaves_the_step_out(models, tmp_path):
    trainer = start(settings(models("stable_diffusion"), rank=2, mixed_precision="fp16"), tmp_path)
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    loss, norm = trainer.train_step()
    assert loss.isfinite()
    assert not norm.isfinite()
    assert all(old.equal(new) for old, new in zip(before, trainer.parameters, strict=True))
    trainer.state.seconds = 1.0
    assert trainer._log_row([loss], norm)["grad_norm"] is None
    trainer._checkpoint()
    resumed = start(replace(trainer.config, resume_from_checkpoint="latest"), tmp_path)
    assert resumed.state.scaler.get_scale() == 2.0**39


def test_compiled_lora_training_is_the_same_training(models):
    config = settings(models("class_conditional"), rank=2)
    plain, compiled = start(config), start(replace(config, compile=True))
    for _ in range(3):
        assert compiled.train_step()[0].item() == pytest.approx(plain.train_step()[0].item(), rel=1e-3)
    assert type(compiled.state.student.called).__name__ == "OptimizedModule"


def test_the_relative_delta_of_a_lora_is_that_of_the_merged_weights(models):
    trainer = start(settings(models("unconditional"), rank=2, lora_alpha=6, learning_rate=1e-2))  # convolutions too
    while trainer.state.step < 3:
        trainer.train_step()
    theta = load_pretrained(ModelOptions(str(models("unconditional")))).denoiser
    pairs = [*zip(trainer.state.student.merged().parameters(), theta.parameters(), strict=True)]
    delta = torch.stack([(now - old).norm() for now, old in pairs]).norm()
    norm = torch.stack([old.norm() for _, old in pairs]).norm()
    assert trainer.state.relative_delta() == pytest.approx((delta / norm).item(), rel=1e-3)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_lora_files_for_diffusers_and_for_comfyui(models, tmp_path, family):
    trainer = start(settings(models(family), rank=2, lora_alpha=6, learning_rate=1e-2), tmp_path)
    trainer.run()
    folder = save_negative(trainer.state, "completed")
    pipeline = DiffusionPipeline.from_pretrained(models(family))
    pipeline.load_lora_weights(folder, weight_name="negative_kohya.safetensors")
    base, sample, time = trainer.state.base, torch.randn(1, 4, 8, 8), torch.tensor([300.0])
    with torch.no_grad():
        theirs, ours = (
            base.predict(model, sample, time, torch.tensor([0])) for model in (pipeline.unet, trainer.state.model)
        )
    torch.testing.assert_close(theirs, ours)

    kohya = load_file(folder / "negative_kohya.safetensors")
    # ComfyUI asks for lora_unet_ and the layer's path with underscores, then .lora_up.weight, .lora_down.weight and .alpha.
    paths = [path for path, layer in base.denoiser.named_modules() if isinstance(layer, BaseTunerLayer)]
    layers = {f"lora_unet_{path.replace('.', '_')}" for path in paths}
    assert kohya.keys() == {
        f"{layer}.{part}" for layer in layers for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    assert {key: value.item() for key, value in kohya.items() if key.endswith("alpha")} == {
        f"{key}.alpha": 6.0 for key in layers
    }
    for name in ("negative_kohya.safetensors", "pytorch_lora_weights.safetensors"):
        with safe_open(folder / name, framework="pt") as file:
            header = file.metadata()
        assert header["modelspec.architecture"] == f"{base.family.architecture}/lora"
        assert {
            "modelspec.sai_model_spec",
            "modelspec.title",
            "modelspec.implementation",
            "ss_base_model_version",
        } <= header.keys()
    with safe_open(folder / "negative_kohya.safetensors", framework="pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == ("2", "6.0")


@pytest.mark.parametrize(("rollout", "used"), [("pool", 4 + 1), ("fresh", 2 * 4)])
def test_no_more_prompts_are_encoded_than_can_be_drawn(models, tmp_path, capsys, rollout, used):
    (tmp_path / "prompts.txt").write_text("".join(f"cat number {number}\n" for number in range(100)))
    config = settings(models("stable_diffusion"), prompts=str(tmp_path / "prompts.txt"), rollout=rollout)
    prompts = read_data(config, Source(config)).prompts
    assert prompts == [f"cat number {index * 100 // used}" for index in range(used)]
    assert f"note: {used} of the 100 prompts are used" in capsys.readouterr().out
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


def test_validation_grids_show_plain_beside_guided(models, tmp_path):
    config = settings(models("stable_diffusion"), validation_prompt=("a cat", "a dog"), validation_steps=2)
    trainer = start(config, tmp_path)
    trainer.run()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert trainer.state.base.asked(2).tolist() == [2, 3]
    first = (tmp_path / "samples" / "step-000004.png").read_bytes()
    save_grid(tmp_path / "samples" / "step-000004.png", trainer.state)
    assert (tmp_path / "samples" / "step-000004.png").read_bytes() == first  # fixed seeds


def test_metrics_record_the_cost(models, tmp_path):
    from selfnpo.train import main

    config = settings(models("stable_diffusion"), output_dir=tmp_path / "out", gradient_accumulation_steps=3)
    main(config)
    cost = json.loads((tmp_path / "out" / "metrics.json").read_text())["cost"]
    assert cost["samples"] == 4 * 2 * 3
