"""The model card: valid metadata, and only what is true of the model."""

import re
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from commands import QUICK, call
from runs import settings, start
from selfnpo.export.negative import add_picture, card, save_negative
from selfnpo.export.run_cost import LITTLE, strength_note

README = "---\nlicense: {}\n{}---\n# A base\n"


def card_of(folder, family: str, output, **changes) -> ModelCard:
    trainer = start(settings(folder, max_train_steps=1, **changes), output)
    trainer.run()
    return ModelCard(card(trainer.state, "completed"))


@pytest.mark.parametrize(
    ("family", "rank", "tag"),
    [
        ("stable_diffusion", 0, "text-to-image"),
        ("stable_diffusion", 2, "text-to-image"),
        ("stable_diffusion_xl", 2, "text-to-image"),
        ("cogvideox", 2, "text-to-video"),
        ("unconditional", 2, "unconditional-image-generation"),
        ("class_conditional", 0, None),
    ],
)
def test_its_metadata_and_words(models, tmp_path, family, rank, tag):
    told = card_of(models(family), family, tmp_path, rank=rank)
    is_lora = bool(rank) and family != "unconditional"  # where the LoRA is merged
    assert told.data.library_name == "diffusers"
    assert told.data.pipeline_tag == tag
    assert ("lora" in told.data.tags) == is_lora
    assert told.data.license is None
    assert told.data.base_model is None  # a folder here, which the hub does not know
    assert f"See the licence of `{models(family)}`" in told.text
    assert "pip install" in told.text
    assert "arxiv.org/abs/2505.11777" in told.text
    prose = told.text.split("## Settings")[0]
    takes_prompts = family not in ("unconditional", "class_conditional")
    assert ("prompt" in prose) == takes_prompts
    if family.startswith("stable_diffusion"):
        file = "negative_kohya.safetensors" if rank else "diffusion_pytorch_model.safetensors"
        assert f"In ComfyUI, copy `{file}`" in prose
    else:
        assert "ComfyUI" not in prose


@pytest.mark.parametrize(
    ("licence", "more", "sentence"),
    [
        ("creativeml-openrail-m", "", "its base: creativeml-openrail-m."),
        (
            "other",
            "license_name: my-licence\nlicense_link: LICENSE.md\n",
            "its base: my-licence (LICENSE.md).",
        ),
    ],
)
def test_the_licence_of_the_base(models, tmp_path, licence, more, sentence):
    base = shutil.copytree(models("unconditional"), tmp_path / "base")
    (base / "README.md").write_text(README.format(licence, more))
    told = card_of(base, "unconditional", tmp_path / "out")
    assert told.data.license == licence
    assert told.data.to_dict().get("license_link") == ("LICENSE.md" if more else None)
    assert sentence in told.text


@pytest.mark.parametrize(
    "readme", ["# no metadata", "---\n- a list\n---\n", "---\na: [\n---\n", "---\nlicense: [a, b]\n---\n"]
)
def test_a_base_whose_licence_is_not_said(models, tmp_path, readme):
    base = shutil.copytree(models("unconditional"), tmp_path / "base")
    (base / "README.md").write_text(readme)
    told = card_of(base, "unconditional", tmp_path / "out")
    assert told.data.license is None
    assert f"See the licence of `{base}`" in told.text


def test_a_base_of_two_models(models, tmp_path, put_in_cache, monkeypatch):
    base = shutil.copytree(models("stable_diffusion"), tmp_path / "base")
    (base / "README.md").write_text(README.format("mit", ""))
    put_in_cache(base, "somebody/base")
    put_in_cache(base / "unet", "somebody/tuned")
    told = card_of("somebody/base", "stable_diffusion", tmp_path / "one", rank=2)
    assert told.data.to_dict()["base_model"] == "somebody/base"
    assert told.data.to_dict()["base_model_relation"] == "adapter"
    assert told.data.license == "mit"
    two = card_of("somebody/base", "stable_diffusion", tmp_path / "two", denoiser_name_or_path="somebody/tuned")
    assert two.data.to_dict()["base_model"] == ["somebody/tuned", "somebody/base"]
    assert two.data.to_dict()["base_model_relation"] == "finetune"
    assert two.data.license is None
    assert "See the licence of `somebody/base`, `somebody/tuned`" in two.text


def test_its_picture_lies_beside_it(models, tmp_path):
    trainer = start(settings(models("unconditional"), max_train_steps=1), tmp_path)
    trainer.run()
    folder = save_negative(trainer.state, "completed")
    assert "![" not in (folder / "README.md").read_text()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "grid.png")
    add_picture(trainer.state, "completed", tmp_path / "grid.png")
    (name,) = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "README.md").read_text())
    assert (folder / name).read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_a_run_that_moved_little_says_so(models, tmp_path, capsys):
    weak = start(settings(models("unconditional"), max_train_steps=1, learning_rate=1e-6), tmp_path / "weak")
    weak.run()
    assert weak.state.relative_delta() < LITTLE
    assert strength_note(weak.state).startswith(
        f"note: the weights moved by only {100 * weak.state.relative_delta():.2g} %."
    )
    strong = start(settings(models("unconditional"), learning_rate=1e-2), tmp_path / "strong")
    strong.run()
    assert strength_note(strong.state) == ""
    assert call("train", *QUICK, "--output_dir", tmp_path / "demo", "--learning_rate", "1e-6") == 0
    assert "note: the weights moved by only " in capsys.readouterr().out
