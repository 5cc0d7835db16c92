"""python -m selfnpo.sample --output_dir: one file per image, which says how it was made."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from commands import call
from fine_tunes import fine_tune
from selfnpo.models import ModelOptions, load_negative, load_pretrained
from selfnpo.sampling import folder
from selfnpo.sampling.ddim import ddim_sample, noise_of
from selfnpo.sampling.decode import decode_samples
from selfnpo.sampling.metadata import image_text
from selfnpo.sampling.picture import to_bytes
from selfnpo.sampling.sweep import Method

STEPS = 5
PROMPTS = ["a cat", "two dogs, one: asleep", 'a "quoted" müßige bee']


@pytest.fixture
def write(models, tmp_path, monkeypatch):
    """Exit code of the command on a tiny model and a negative of it, into `out`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(*flags, family="class_conditional"):
        negative = tmp_path / f"{family}-negative"
        if not negative.exists():
            fine_tune(models(family), negative, seed=1)
        model = ("--model", models(family), "--negative", negative, "--num_inference_steps", STEPS)
        return call("sample", *model, "--output_dir", "out", *flags)

    return run


def files(tmp_path):
    return sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_equal_names_in_two_folders_with_everything_about_them(write, tmp_path, models):
    flags = ("--prompts", "prompts.txt", "--guidance_scale", 3, "--beta", 0.5, "--seed", 7, "--batch_size", 2)
    assert write(*flags, family="stable_diffusion") == 0
    names = ["0000.png", "0001.png", "0002.png"]
    both = [f"{kind}/{name}" for kind in ("cfg", "negative") for name in names]
    assert files(tmp_path) == [*both, "prompts.jsonl", "samples.json"]
    lines = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": name, "prompt": prompt} for name, prompt in zip(names, PROMPTS, strict=True)
    ]
    for number, prompt in enumerate(PROMPTS):
        for kind in ("cfg", "negative"):
            with Image.open(tmp_path / "out" / kind / names[number]) as image:
                text, size = image.text, image.size
            settings = json.loads(text["selfnpo"])
            assert (settings["prompt"], settings["image"], settings["seed"]) == (prompt, number, 7)
            assert (settings["guidance_scale"], settings["num_inference_steps"]) == (3, STEPS)
            assert (settings["width"], settings["height"]) == size
            assert settings["pretrained_model_name_or_path"] == str(models("stable_diffusion"))
            assert (settings.get("beta"), "negative" in settings) == ((0.5, True) if kind == "negative" else (None, False))
            first, last = text["parameters"].rsplit("\n", 1)
            assert first == prompt
            line = f"Steps: {STEPS}, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: {size[0]}x{size[1]}, Model: "
            assert last.startswith(line)


def test_values_that_would_break_the_line_are_quoted():
    settings = {
        "prompt": "x", "num_inference_steps": 25, "guidance_scale": 7.5, "seed": 1, "width": 8, "height": 8, "image": 0,
        "pretrained_model_name_or_path": "C:/models, new", "beta": 1.0, "negative": "n",
    }  # fmt: skip
    assert image_text(settings)["parameters"] == (
        "x\nSteps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 8x8, "
        'Model: "C:/models, new", Image: 0, Negative model: n, Negative beta: 1'
    )


def test_an_image_is_the_same_in_whichever_batch_and_as_in_a_sheet(write, tmp_path, models):
    assert write("--num_images", 5, "--batch_size", 2, "--guidance_scale", 2) == 0
    base = load_pretrained(ModelOptions(str(models("class_conditional"))))
    negative = load_negative(tmp_path / "class_conditional-negative", base)
    index = torch.arange(5)
    for kind, model in (("cfg", None), ("negative", negative)):
        samples = ddim_sample(base, noise_of(base, index, 0), index % base.num_conditions, 2.0, model, None, STEPS)
        for number, expected in enumerate(to_bytes(decode_samples(base, samples)).numpy()):
            got = pixels(tmp_path / "out" / kind / f"{number:04}.png")
            assert np.abs(got.astype(int) - expected).max() <= 1


def test_samples_are_replaced_only_if_asked(write, tmp_path, capsys, monkeypatch):
    assert write("--num_images", 2) == 0
    for name in ("cfg/scores.txt", "reference/0000.png"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("selfnpo.models.loading.load_pretrained", None)
        assert write("--num_images", 2) == 2
    assert "output_dir out exists and is not empty; choose another or pass --overwrite" in capsys.readouterr().err
    assert files(tmp_path) == before
    assert write("--num_images", 1, "--seed", 1, "--guidance_scales", 2, 3, "--overwrite") == 0
    made = [
        f"{kind}_scale-{scale}{beta}/0000.png" for kind, beta in (("cfg", ""), ("negative", "_beta-1")) for scale in (2, 3)
    ]
    assert files(tmp_path) == ["cfg/scores.txt", *made, "prompts.jsonl", "reference/0000.png", "samples.json"]
    assert not (tmp_path / "out" / "negative").exists()
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (record["seed"], record["guidance_scale"], record["beta"]) == (1, [2, 3], [1])


def test_a_folder_of_other_things_is_never_touched(write, tmp_path, capsys):
    trained = tmp_path / "out" / "negative" / "config.json"
    trained.parent.mkdir(parents=True)
    trained.write_text("a model")
    for flags in ((), ("--overwrite",)):
        assert write("--num_images", 1, *flags) == 2
        assert "out is not empty and has no samples.json" in capsys.readouterr().err
        assert files(tmp_path) == ["negative/config.json"]


def test_memory_holds_a_batch(write, tmp_path, monkeypatch):
    """The files of a batch are there before the next one is sampled."""
    seen = []
    monkeypatch.setattr(
        "selfnpo.sampling.sweep.ddim_sample",
        lambda base, noise, *args: (
            seen.append((len(noise), len(list(tmp_path.rglob("0*.png"))))) or ddim_sample(base, noise, *args)
        ),
    )
    assert write("--num_images", 5, "--batch_size", 2) == 0
    assert seen == [(2, 0), (2, 2), (2, 4), (2, 6), (1, 8), (1, 9)]


def test_an_unconditional_model_has_a_base_in_place_of_cfg(write, tmp_path):
    assert write("--num_images", 2, "--guidance_scales", 2, 3, family="unconditional") == 0
    kinds = {name.split("/")[0] for name in files(tmp_path)} - {"prompts.jsonl", "samples.json"}
    assert kinds == {"base", "negative_scale-2_beta-1", "negative_scale-3_beta-1"}


def test_names_of_folders():
    methods = [Method(3.0), Method(3.0, 0.5), Method(3.0, 1.0)]
    names = {Method(3.0): "cfg_scale-3", methods[1]: "negative_scale-3_beta-0.5", methods[2]: "negative_scale-3_beta-1"}
    assert folder.folder_names(methods, False) == names
    alike = [Method(7.5, 0.1234561), Method(7.5, 0.1234562), Method(7.5000001, 0.5)]
    assert len({*folder.folder_names(alike, False).values()}) == 3
    assert list(folder.folder_names([Method(1.0), Method(2.0, 1.0)], True).values()) == ["positive", "negative"]
