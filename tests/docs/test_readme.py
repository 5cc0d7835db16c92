"""The README's commands for real models, run on tiny models of the same families."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from commands import call

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## Your own checkpoint")[1].split("\n## ")[0]
BLOCK = re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL)[1].replace("\\\n", " ")
COMMANDS = [shlex.split(line)[3:] for line in BLOCK.splitlines() if line.startswith("python -m selfnpo.train")]
SAMPLE = next(shlex.split(line)[3:] for line in BLOCK.splitlines() if line.startswith("python -m selfnpo.sample"))
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable_diffusion",
    "mhdang/dpo-sd1.5-text2image-v1": "stable_diffusion",
    "stabilityai/stable-diffusion-xl-base-1.0": "stable_diffusion_xl",
    "THUDM/CogVideoX-2b": "cogvideox",
}
# Small enough for tiny models; everything else is as in the README.
SMALLER = {"--rank": "4", "--num_frames": "5", "--validation_steps": "2"}
SHORT = ["--max_train_steps", "2", "--num_inference_steps", "10", "--train_batch_size", "2"]


def on_tiny_models(models, arguments):
    return [str(models(MODELS[each])) if each in MODELS else each for each in arguments]


def train(models, arguments):
    smaller = [SMALLER.get(before, each) for before, each in zip(["", *arguments], arguments, strict=False)]
    pool = [] if "released" in arguments else ["--pool_size", "1"]
    assert call("train", *on_tiny_models(models, smaller), *SHORT, *pool) == 0


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "images").mkdir()
    Image.effect_noise((80, 80), 90).convert("RGB").save(tmp_path / "images" / "one.png")


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[-1].replace("runs/", ""))
def test_training(models, arguments, capsys):
    train(models, arguments)
    output = Path(arguments[arguments.index("--output_dir") + 1])
    names = {path.name for path in (output / "negative").iterdir()}
    if "--rank" not in arguments:
        assert names == {"README.md", "samples.png", "config.json", "diffusion_pytorch_model.safetensors"}
    else:
        kohya = set() if "CogVideoX" in " ".join(arguments) else {"negative_kohya.safetensors"}
        assert names == {"README.md", "samples.png", "pytorch_lora_weights.safetensors"} | kohya
    assert list((output / "samples").glob("step-*.png"))
    said = capsys.readouterr().out
    assert said.startswith("model      ")
    assert "\nmemory plan: " in said
    if "--denoiser_name_or_path" in arguments:  # the card knows what base that makes
        card = re.search(r"python -m selfnpo.sample (.*?)```", (output / "negative" / "README.md").read_text(), re.DOTALL)[1]
        assert f"--denoiser_name_or_path {models('stable_diffusion')} --negative {output / 'negative'}" in card
        assert call("sample", *shlex.split(card.replace("\\\n", "")), "--num_inference_steps", 10) == 0
    if output.name in " ".join(SAMPLE):
        assert call("sample", *on_tiny_models(models, SAMPLE), "--num_inference_steps", 10) == 0
        assert Path("samples.png").is_file()


def test_every_model_is_shown():
    assert len(COMMANDS) == 5
    assert SAMPLE[SAMPLE.index("--negative") + 1] == "runs/sdxl/negative"
    assert {name for arguments in COMMANDS for name in arguments} >= MODELS.keys()
