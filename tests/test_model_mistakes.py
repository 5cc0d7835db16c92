"""What users get wrong with real models: one sentence, exit code 2, and nothing written."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import tiny
from commands import call
from original_format import save_single_file
from selfnpo.errors import UserError
from selfnpo.models import ModelOptions, Source
from selfnpo.models.lora.read import LORA_FILE

SHORT = ("--max_train_steps", 2, "--train_batch_size", 1, "--num_inference_steps", 10)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that training on a model with these flags ends in one sentence that holds `sentence`."""

    def check(model, sentence, *flags):
        before = sorted(tmp_path.rglob("*"))
        output = ("--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "out")
        short = (*SHORT, *(() if "released" in flags else ("--pool_size", 1)))
        assert call("train", *short, *output, *flags) == 2
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert sentence in last
        assert "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nobody/no-such-model", "nobody/no-such-model was not found locally or on the hub"),
        ("model.ckpt", "convert it once: python -c"),
        ("absent.safetensors", "absent.safetensors does not exist"),
    ],
)
def test_models_that_are_not_there(refused, model, sentence):
    refused(model, sentence)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"])
def test_a_damaged_file_of_a_base_is_named(models, refused, tmp_path, part):
    shutil.copytree(models("stable_diffusion"), tmp_path / "base")
    file = tmp_path / "base" / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    refused(tmp_path / "base", f"{file} could not be read as safetensors")


def test_a_local_model_is_asked_for_where_the_hub_must_not_be(refused):
    refused("nobody/no-such-model", "was not found locally or on the hub", "--local_files_only")


BREAKAGES = {
    "no denoiser": (lambda f: shutil.rmtree(f / "unet"), "contains neither unet/config.json nor transformer/config.json"),
    "no weights": (
        lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "could not be loaded as a UNet2DConditionModel from safetensors",
    ),
    "no weights of the autoencoder": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "contains no weights for its vae; expected a complete pipeline",
    ),
    "no size": (
        lambda f: edit(f / "unet" / "config.json", sample_size=None),
        "the model's configuration has no sample_size; pass --resolution",
    ),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "tokenizer, text_encoder of"),
    "no text encoder named": (
        lambda f: edit(f / "model_index.json", text_encoder=[None, None]),
        "has no text_encoder in its model_index.json; expected a complete StableDiffusionPipeline",
    ),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler/scheduler_config.json"),
    "unknown scheduler": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="MyScheduler"),
        "is MyScheduler, which diffusers does not know",
    ),
    "noise of another kind": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler"),
        "EDMEulerScheduler has no alphas_cumprod to derive noise levels from; expected a model with a DDPM-like scheduler",
    ),
    "weights of a variant": (
        lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").rename(
            f / "unet" / "diffusion_pytorch_model.fp16.safetensors"
        ),
        "unet contains no weights without a variant; pass --variant fp16",
    ),
    "pickled text encoder": (
        lambda f: (f / "text_encoder" / "model.safetensors").rename(f / "text_encoder" / "pytorch_model.bin"),
        "text_encoder contains weights in a format that can run code when it is opened; convert them once: python -c",
    ),
    "unknown family": (
        lambda f: edit(f / "unet" / "config.json", _class_name="UNet3DConditionModel"),
        "expected CogVideoXTransformer3DModel, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel",
    ),
    "inpainting": (lambda f: edit(f / "unet" / "config.json", in_channels=9), "variant for inpainting"),
    "two kinds of condition": (
        lambda f: edit(f / "unet" / "config.json", class_embed_type="projection"),
        "variant that needs more",
    ),
    "another text encoder": (
        lambda f: edit(f / "unet" / "config.json", cross_attention_dim=24),
        "returns encoder_hidden_states of shape [77, 32], but the denoiser expects [77, 24]",
    ),
    "broken config": (lambda f: (f / "unet" / "config.json").write_text("{"), "unet/config.json of"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_incomplete_and_foreign_models(models, refused, tmp_path, breakage):
    folder = shutil.copytree(models("stable_diffusion"), tmp_path / "model")
    damage, sentence = BREAKAGES[breakage]
    damage(folder)
    refused(folder, sentence)


def pickle(folder: Path) -> None:
    """Weights as older repositories hold them."""
    for file in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


def test_pickled_weights_are_refused_with_the_command_that_converts_them(models, refused, tmp_path, put_in_cache):
    folder = shutil.copytree(models("stable_diffusion"), tmp_path / "model")
    pickle(folder)
    refused(folder, f"and use {folder}-safetensors")
    refused(models("stable_diffusion"), "import UNet2DConditionModel as C", "--denoiser_name_or_path", folder)
    with pytest.raises(UserError) as refusal:
        Source(ModelOptions(str(folder))).denoiser(torch.float32)
    exec(re.search(r'python -c "(.*)"', str(refusal.value))[1])
    converted = Source(ModelOptions(f"{folder}-safetensors")).denoiser(torch.float32)
    original = Source(ModelOptions(str(models("stable_diffusion")))).denoiser(torch.float32)
    assert all(a.equal(b) for a, b in zip(converted.parameters(), original.parameters(), strict=True))

    put_in_cache(folder, "somebody/pickled")
    refused("somebody/pickled", "C.from_pretrained('somebody/pickled').save_pretrained('pickled-safetensors')")


def test_a_variant_that_is_not_there(models, refused):
    refused(models("stable_diffusion"), "contains no weights for the variant fp16; leave --variant out", "--variant", "fp16")


def test_an_autoencoder_of_another_kind(models, refused, tmp_path):
    folder = shutil.copytree(models("unconditional"), tmp_path / "model")
    (folder / "vqvae").mkdir()
    (folder / "vqvae" / "config.json").write_text("{}")
    refused(folder, "has a vqvae, which is not supported; expected a model with a vae, or in pixel space")


def test_noise_of_exploding_variance(models, refused, tmp_path):
    folder = shutil.copytree(models("unconditional"), tmp_path / "model")
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="ScoreSdeVeScheduler")
    refused(folder, "ScoreSdeVeScheduler has no alphas_cumprod")


def test_steps_are_refused_before_anything_lasts(models, tmp_path, capsys):
    model = ("--pretrained_model_name_or_path", models("stable_diffusion"), "--output_dir", tmp_path / "out")
    assert call("train", *model, "--num_inference_steps", 30) == 2
    assert capsys.readouterr().out == "loading PyTorch and diffusers\n"  # and no memory plan, which precedes the weights


def test_an_extra_that_is_not_installed(models, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(models("stable_diffusion"), "run pip install 'selfnpo[bitsandbytes]'", "--use_8bit_adam")


def test_a_unet_alone_is_no_model(models, refused):
    refused(models("stable_diffusion") / "unet", "pass a UNet without a pipeline as --denoiser_name_or_path")


def test_single_files(models, refused, tmp_path):
    file = save_single_file(models("stable_diffusion"), tmp_path / "model.safetensors")
    part, weights = tmp_path / "part.safetensors", load_file(file)
    for gone in ("middle_block", "transformer.text_model.encoder.layers.1"):
        save_file({name: tensor for name, tensor in weights.items() if gone not in name}, part)
        refused(part, "expected a complete checkpoint", "--single_file_config", models("stable_diffusion"))
    part.write_bytes(file.read_bytes()[:1000])
    refused(part, "could not be", "--single_file_config", models("stable_diffusion"))
    refused(part, "was not recognised as a diffusion model; pass a diffusers folder")
    refused(file, "needs the configuration of stable-diffusion-v1-5/stable-diffusion-v1-5, which could not be read; pass a")
    refused(file, "but diffusers cannot load a CogVideoX", "--single_file_config", models("cogvideox"))


@pytest.mark.parametrize(
    ("family", "flags", "sentence"),
    [
        ("stable_diffusion", ["--resolution", 100], "resolution is 100; expected a multiple of 8 for this model"),
        ("stable_diffusion_xl", ["--width", 4], "width is 4; expected a multiple of 8 for this model, such as 8"),
        ("cogvideox", ["--height", 72], "height is 72; expected a multiple of 16 for this model, such as 64"),
        ("cogvideox", ["--num_frames", 8], "num_frames is 8; expected a multiple of 4 plus 1, such as 9"),
        ("unconditional", ["--resolution", 17], "resolution is 17; expected a multiple of 2"),
        ("class_conditional", ["--resolution", 128], "the only size that this DiT supports"),
        ("stable_diffusion", ["--rank", 64], "rank is 64, which is too large for the layer"),
        ("stable_diffusion", ["--rank", 2, "--lora_target_modules", "to_x"], "lora_target_modules ['to_x'] match no layers"),
        ("stable_diffusion", ["--rank", 2, "--lora_alpha", -1], "lora_alpha is -1.0; expected a positive number"),
        ("stable_diffusion", ["--prompts", "absent.txt"], "prompts absent.txt could not be read"),
        ("stable_diffusion", ["--preset", "released"], "but no images are given; pass --train_data_dir FOLDER"),
        ("stable_diffusion", ["--attention", "xformers"], "attention is xformers, which cannot run here"),
        ("cogvideox", ["--attention", "xformers"], "diffusers does not support it for cogvideox models"),
        ("unconditional", ["--validation_prompt", "a cat"], "but the model is unconditional; leave it out"),
        ("class_conditional", ["--validation_prompt", "12"], "expected a class number from 0 to 9"),
        ("stable_diffusion", ["--denoiser_name_or_path", "nowhere"], "nowhere was not found locally or on the hub"),
        ("stable_diffusion", ["--lora_name_or_path", "nowhere"], "nowhere was not found locally or on the hub"),
        ("stable_diffusion", ["--lora_name_or_path", "lora.pt"], "in a format that can run code"),
        ("unconditional", ["--lora_name_or_path", "."], "diffusers does not support LoRAs for DDPMPipeline"),
        ("stable_diffusion", ["--gradient_accumulation_steps", 0], "gradient_accumulation_steps is 0"),
        (
            "stable_diffusion",
            ["--validation_guidance_scale", 1],
            "validation_guidance_scale is 1.0; expected a value above 1",
        ),
        ("stable_diffusion", ["--train_data_dir", "x"], "train_data_dir is given, but rollout is pool"),
    ],
)
def test_settings_that_do_not_fit_the_model(models, refused, family, flags, sentence):
    refused(models(family), sentence, *flags)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b" \n\n", "has no prompts; expected one per line"),
        ("latin.txt", "ein Hund\nein Bär".encode("latin-1"), "line 2 of"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 of"),
        ("keys.jsonl", b'{"name": "a"}', "has no text under prompt, text, caption"),
    ],
)
def test_prompt_files(models, refused, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    refused(models("stable_diffusion"), sentence, "--prompts", tmp_path / name)


def test_prompts_for_a_model_that_takes_none(models, refused, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    for family in ("unconditional", "class_conditional"):
        refused(models(family), "but the model takes no prompts; leave it out", "--prompts", tmp_path / "prompts.txt")


def test_an_image_folder_without_images(models, refused, tmp_path):
    (tmp_path / "images").mkdir()
    released = ("--preset", "released", "--train_data_dir", tmp_path / "images")
    refused(models("stable_diffusion"), "has no images; expected files that end in .png", *released)
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    refused(models("stable_diffusion"), "a.png could not be read as an image", *released)
    refused(
        models("stable_diffusion"), "use the images' captions; leave out one of the two", *released, "--prompts", "p.txt"
    )


def test_a_lora_and_a_unet_for_another_base(models, refused, tmp_path, capsys):
    trained = (
        "--pretrained_model_name_or_path",
        models("stable_diffusion_xl"),
        "--output_dir",
        tmp_path / "xl",
        "--rank",
        2,
    )
    assert call("train", *SHORT, *trained) == 0
    lora = tmp_path / "xl" / "negative"
    refused(models("stable_diffusion"), "is a LoRA for another base: it changes", "--lora_name_or_path", lora)
    refused(
        models("cogvideox"),
        "changes nothing in the transformer; expected a LoRA for this model family",
        "--lora_name_or_path",
        lora,
    )
    base = models("stable_diffusion")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    refused(base, "could not be read as a LoRA from safetensors", "--lora_name_or_path", tmp_path / "broken.safetensors")
    weights = {key: tensor * torch.nan for key, tensor in load_file(lora / LORA_FILE).items()}
    save_file(weights, tmp_path / "nan.safetensors")
    xl, nan = models("stable_diffusion_xl"), tmp_path / "nan.safetensors"
    refused(xl, "nan.safetensors contains weights that are inf or NaN, such as unet.", "--lora_name_or_path", nan)
    other = tmp_path / "other"
    tiny.unet(cross_attention_dim=24).save_pretrained(other)
    refused(base, "has a different architecture than the base", "--denoiser_name_or_path", other)
    assert call("sample", "--pretrained_model_name_or_path", base, "--negative", lora, "--output", tmp_path / "x.png") == 2
    assert "is a LoRA for another base" in capsys.readouterr().err


def test_the_folder_of_another_run(models, refused, tmp_path):
    model = models("stable_diffusion")
    assert call("train", *SHORT, "--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "out") == 0
    refused(model, "exists and is not empty; choose another or pass --overwrite")
    refused(model, "the checkpoint was made with rank = 0, got 2", "--resume_from_checkpoint", "latest", "--rank", 2)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    next(unet.parameters()).data.add_(1)
    unet.save_pretrained(tmp_path / "unet")
    changed = shutil.copytree(model, tmp_path / "changed")
    unet.save_pretrained(changed / "unet")
    before = (tmp_path / "out" / "checkpoint-2" / "state.json").read_text()
    settings = tmp_path / "out" / "config.yaml"
    moved = settings.read_text().replace(str(model), str(changed))
    (tmp_path / "moved.yaml").write_text(moved)
    refused(changed, "the checkpoint was made with pretrained_model_name_or_path", "--resume_from_checkpoint", "latest")
    assert (tmp_path / "out" / "checkpoint-2" / "state.json").read_text() == before
