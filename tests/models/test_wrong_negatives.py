"""Wrong negatives and positives are noticed before text encoders, denoisers or judges are loaded."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import tiny
from commands import call
from fine_tunes import WEIGHTS, fine_tune, save_both_loras
from original_format import save_single_file
from selfnpo.models import DEMO_FOLDER, ModelOptions, Source, check_negative
from selfnpo.models.lora.read import LORA_FILE

MISTAKES = {
    "missing": "nowhere was not found locally or on the hub",
    "missing.safetensors": "missing.safetensors does not exist; expected a .safetensors file",
    "empty": "contains neither config.json nor unet/config.json; expected a UNet2DConditionModel",
    "text.txt": "text.txt is not a .safetensors file",
    "pickle.ckpt": "is in a format that can run code when it is opened",
    "vae": "is of class AutoencoderKL; expected UNet2DConditionModel, like the base",
    "narrow": "has a different architecture than the base",
    "bare": "contains no weights; expected UNet2DConditionModel weights in a *.safetensors file next to config.json",
    "cut": "could not be read as safetensors",
    "broken-config": "config.json of ",
    "file-of-sdxl.safetensors": "could not be loaded as a UNet2DConditionModel with the base's architecture",
    "file-of-nothing.safetensors": "could not be loaded as a UNet2DConditionModel",
    "cut.safetensors": "could not be read as safetensors",
    "lora-of-sdxl": "is a LoRA for another base: it changes",
    "lora-nan": "contains weights that are inf or NaN",
    "lora-cut": "could not be read as a LoRA from safetensors",
}


@pytest.fixture(scope="module")
def wrong(models, tmp_path_factory):
    """A folder with every mistake under its name."""
    root = tmp_path_factory.mktemp("wrong")
    base, sdxl = models("stable_diffusion"), models("stable_diffusion_xl")
    (root / "empty").mkdir()
    (root / "text.txt").write_text("a cat")
    shutil.copytree(base / "vae", root / "vae")
    tiny.unet(cross_attention_dim=24).save_pretrained(root / "narrow")
    good = fine_tune(base, root / "good")
    for name in ("bare", "cut", "broken-config"):
        shutil.copytree(good, root / name)
    (root / "bare" / WEIGHTS).unlink()
    content = (root / "cut" / WEIGHTS).read_bytes()
    (root / "cut" / WEIGHTS).write_bytes(content[: len(content) // 2])
    (root / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (root / "broken-config" / "config.json").write_text("{")
    save_single_file(sdxl, root / "file-of-sdxl.safetensors")
    save_file({"other.weight": torch.zeros(3)}, root / "file-of-nothing.safetensors")
    save_both_loras(sdxl, root / "lora-of-sdxl", seed=1)
    save_both_loras(base, root / "lora-nan", seed=1)
    shutil.copytree(root / "lora-nan", root / "lora-cut")
    weights = load_file(root / "lora-nan" / LORA_FILE)
    save_file({key: tensor * torch.nan for key, tensor in weights.items()}, root / "lora-nan" / LORA_FILE)
    content = (root / "lora-cut" / LORA_FILE).read_bytes()
    (root / "lora-cut" / LORA_FILE).write_bytes(content[: len(content) // 2])
    return root


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def fail(*_, **__):
        pytest.fail("was loaded")

    for name in ("pipeline", "denoiser", "replacement"):
        monkeypatch.setattr(Source, name, fail)
    monkeypatch.setattr("selfnpo.models.loading.load_pretrained", fail)
    monkeypatch.setattr("selfnpo.demo.metrics.Metrics", fail)


def refused(capsys, sentence, *arguments):
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("command", ["sample", "merge"])
def test_a_wrong_negative(wrong, models, tmp_path, capsys, monkeypatch, nothing_is_loaded, command, name):
    monkeypatch.chdir(tmp_path)
    path = "nowhere" if name == "missing" else wrong / name
    refused(capsys, MISTAKES[name], command, "--model", models("stable_diffusion"), "--negative", path)
    refused(
        capsys, MISTAKES[name], command, "--model", models("stable_diffusion"), "--negative", wrong / "good",
        "--positive", path,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_negative_of_the_demo(wrong, tmp_path, capsys, nothing_is_loaded):
    for path, sentence in (
        ("nowhere", "nowhere was not found locally or on the hub"),
        (wrong / "good", "is of class UNet2DConditionModel; expected"),
    ):
        refused(capsys, sentence, "evaluate", "--negative", path, "--output_dir", tmp_path / "out")
        refused(capsys, sentence, "sample", "--negative", path, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_right_ones_pass(models, tmp_path, request, family):
    base = models(family)
    source = Source(ModelOptions(str(base)))
    UNet2DConditionModel.from_pretrained(base / "unet").save_pretrained(tmp_path / "half", variant="fp16")
    save_single_file(base, tmp_path / "one.safetensors")
    save_file(load_file(base / "unet" / WEIGHTS), tmp_path / "unet.safetensors")
    save_both_loras(base, tmp_path / "lora", seed=1)
    request.getfixturevalue("nothing_is_loaded")
    for path in (base, base / "unet", tmp_path / "one.safetensors", tmp_path / "unet.safetensors", tmp_path / "lora"):
        check_negative(path, source)
    check_negative(tmp_path / "half", Source(ModelOptions(str(base), variant="fp16")))


def test_a_dit_by_its_former_name_passes(tmp_path, nothing_is_loaded):
    folder = shutil.copytree(DEMO_FOLDER / "transformer", tmp_path / "dit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    check_negative(folder, Source(ModelOptions()))
