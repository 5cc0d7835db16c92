"""The commands of README.md and docs/training.md for real models, run on tiny models of the same families."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from commands import call

ROOT = Path(__file__).parents[2]
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable_diffusion",
    "mhdang/dpo-sd1.5-text2image-v1": "stable_diffusion",
    "stabilityai/stable-diffusion-xl-base-1.0": "stable_diffusion_xl",
    "THUDM/CogVideoX-2b": "cogvideox",
}


def commands(page: str, name: str) -> list[list[str]]:
    """Arguments of the commands `python -m selfnpo.NAME` in the shell blocks of a page, for models of the hub."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)).replace("\\\n", " ")
    found = [shlex.split(line)[3:] for line in blocks.splitlines() if line.startswith(f"python -m selfnpo.{name} ")]
    return [arguments for arguments in found if MODELS.keys() & {*arguments}]


TRAIN = commands("docs/training.md", "train")
(SAMPLE,) = commands("README.md", "sample")
# Small enough for tiny models; everything else is as on the page.
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


@pytest.mark.parametrize("arguments", TRAIN, ids=lambda arguments: arguments[-1].replace("runs/", ""))
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
    assert "\nmodel      " in f"\n{said}"
    assert "\nmemory plan: " in said
    if "--denoiser_name_or_path" in arguments:  # the card knows what base that makes
        card = re.search(r"python -m selfnpo.sample (.*?)```", (output / "negative" / "README.md").read_text(), re.DOTALL)[1]
        assert f"--denoiser_name_or_path {models('stable_diffusion')} --negative {output / 'negative'}" in card
        assert call("sample", *shlex.split(card.replace("\\\n", "")), "--num_inference_steps", 10) == 0
    if output.name in " ".join(SAMPLE):
        assert call("sample", *on_tiny_models(models, SAMPLE), "--num_inference_steps", 10) == 0
        assert Path(SAMPLE[SAMPLE.index("--output") + 1]).is_file()


def test_every_model_is_shown():
    assert len(TRAIN) == 5
    assert SAMPLE[SAMPLE.index("--negative") + 1] == "runs/sdxl/negative"
    assert {name for arguments in TRAIN for name in arguments} >= MODELS.keys()


def test_the_readmes_commands_are_those_of_the_page():
    found = commands("README.md", "train")
    assert len(found) == 2
    assert all(arguments in TRAIN for arguments in found)


def test_the_readme_is_short_and_begins_with_the_installation():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    assert lines.index("## Install") < 30


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if "://" in link:
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                titles = [line for line in target.read_text().splitlines() if line[:1] == "#"]
                anchors = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]
                assert anchor in anchors, f"{page}: {link}"
