"""python -m selfnpo.sample: comparisons, sweeps and videos of every family, and one sentence for what it cannot do."""

import json
import re
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from commands import call
from fine_tunes import fine_tune
from runs import FAMILIES, settings, start
from selfnpo.models import ModelOptions, load_pretrained
from selfnpo.sampling import sweep
from selfnpo.sampling.ddim import ddim_sample, start_noise
from selfnpo.sampling.decode import decode_samples
from selfnpo.training.validation import save_grid
from videos import read_video

PROMPTS = {"class_conditional": ("3", "0"), "unconditional": ()}
STEPS = 5


@pytest.fixture(scope="module")
def perturbed(models, tmp_path_factory):
    """The folder of a denoiser that is some way off a tiny model's, as a fine-tune is."""

    def folder(family, seed=1):
        return fine_tune(models(family), tmp_path_factory.mktemp("fine-tune"), seed)

    return folder


@pytest.fixture
def sample(models, perturbed, tmp_path, monkeypatch):
    """Exit code of the command on a tiny model and a negative of it."""
    monkeypatch.chdir(tmp_path)
    negatives = {}

    def run(family, *flags):
        negatives[family] = negatives.get(family) or perturbed(family)
        prompts = PROMPTS.get(family, ("a cat", "a dog"))
        asked = ("--prompt", *prompts) if prompts else ()
        model = ("--model", models(family), "--negative", negatives[family], "--num_inference_steps", STEPS)
        return call("sample", *model, *asked, *flags)

    return run


@pytest.fixture
def shown(monkeypatch):
    """What the pictures were made of: title to images, and (name of the row, name of the column) to images."""
    found = {}
    for name in ("selfnpo.sampling.comparison", "selfnpo.training.validation"):
        monkeypatch.setattr(f"{name}.save_comparison", lambda path, panels, *_, **__: found.update(panels))

    def keep(path, cells, rows, columns, *_, **__):
        for row, images in zip(rows, cells, strict=True):
            found.update(zip([(row, column) for column in columns], images, strict=True))

    monkeypatch.setattr("selfnpo.sampling.comparison.save_table", keep)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compared_and_swept(sample, tmp_path, family):
    assert sample(family) == 0
    is_video = family.startswith("cogvideox")
    (output,) = tmp_path.iterdir()
    assert output.name == ("samples.gif" if is_video else "samples.png")
    with Image.open(output) as picture:
        assert picture.width > 500
    assert sample(family, "--guidance_scales", 2, 4, "--betas", 0.5, 1, "--output", "sweep.png") == 0
    assert np.ptp(imread(tmp_path / "sweep.png")) > 0.5


@pytest.mark.parametrize(("with_positive", "precision"), [(False, "no"), (True, "no"), (True, "bf16")])
def test_a_cell_of_a_sweep_is_the_comparison_at_its_values(sample, perturbed, shown, with_positive, precision):
    family, flags, share = "class_conditional", ("--mixed_precision", precision), ""
    if with_positive:
        flags += ("--positive", perturbed(family, seed=2), "--alpha", 0.5)
        share = ", alpha = 0.5"
    assert sample(family, *flags, "--guidance_scale", 1.5, 3, "--beta", 1, 0.3, 0.6, "--num_images", 3) == 0
    cells = dict(shown)
    assert len(cells) == 2 * 4
    for scale in (1.5, 3):
        for beta in (1, 0.3, 0.6):
            shown.clear()
            assert sample(family, *flags, "--guidance_scale", scale, "--beta", beta, "--num_images", 3) == 0
            at = f", guidance_scale = {scale}"
            plain, guided = f"plain guidance (CFG){at}", f"negative, beta = {beta}{share}{at}"
            assert shown.keys() == {plain, guided}
            assert cells[f"guidance_scale\n{scale}", f"negative, beta = {beta}{share}"].equal(shown[guided])
            assert cells[f"guidance_scale\n{scale}", "plain guidance (CFG)"].equal(shown[plain])
            assert not shown[plain].equal(shown[guided])


def test_a_negative_that_is_the_base_itself_is_named(sample, models, capsys):
    warning = "has the weights of the base itself, so it changes nothing; expected a fine-tune"
    assert sample("unconditional", "--negative", models("unconditional"), "--output", "base.png") == 0
    assert f"warning: {models('unconditional')} {warning}" in capsys.readouterr().out
    assert sample("unconditional") == 0
    assert warning not in capsys.readouterr().out


def test_plain_guidance_is_of_the_base_alone_and_sampled_once_per_scale(sample, shown, models, monkeypatch):
    calls = []
    monkeypatch.setattr(sweep, "ddim_sample", lambda *args: calls.append(args) or ddim_sample(*args))
    assert sample("stable_diffusion", "--guidance_scale", 2, 5, "--beta", 0.5, 1) == 0
    assert len(calls) == 2 * 3
    base = load_pretrained(ModelOptions(str(models("stable_diffusion"))), further_prompts=("a cat", "a dog"))
    condition = base.asked(2)[torch.arange(4) % 2]
    for scale in (2, 5):
        expected = ddim_sample(base, start_noise(base, 4, 0), condition, scale, num_inference_steps=STEPS)
        torch.testing.assert_close(shown[f"guidance_scale\n{scale}", "plain guidance (CFG)"], decode_samples(base, expected))


def test_without_a_condition_there_is_the_base_in_place_of_plain_guidance(sample, shown, models, perturbed, monkeypatch):
    base = load_pretrained(ModelOptions(str(models("unconditional"))))
    null = torch.zeros(4, dtype=torch.int64)
    expected = ddim_sample(base, start_noise(base, 4, 0), null, 1.0, num_inference_steps=STEPS)
    assert sample("unconditional") == 0
    assert shown["the base itself, no guidance"].equal(expected)
    assert "negative, beta = 1, guidance_scale = 2" in shown
    calls = []
    monkeypatch.setattr(sweep, "ddim_sample", lambda *args: calls.append(args) or ddim_sample(*args))
    assert sample("unconditional", "--guidance_scale", 2, 5) == 0
    assert len(calls) == 2 + 1
    assert all(shown[f"guidance_scale\n{scale}", "the base itself, no guidance"].equal(expected) for scale in (2, 5))
    assert sample("unconditional", "--positive", perturbed("unconditional", seed=2)) == 0
    assert not shown["the positive itself, no guidance"].equal(expected)


@pytest.mark.parametrize(
    ("family", "prompts", "title"),
    [
        ("unconditional", (), "the base itself, no guidance"),
        ("stable_diffusion", (), "the base itself, no guidance"),
        ("stable_diffusion", ("a cat",), "plain guidance (CFG), guidance_scale = 7.5"),
        # Its null condition is not the empty prompt.
        ("stable_diffusion_xl", (), "plain guidance (CFG), guidance_scale = 5"),
        ("class_conditional", (), "plain guidance (CFG), guidance_scale = 4"),
    ],
)
def test_grids_of_a_run_name_what_they_show(models, tmp_path, shown, family, prompts, title):
    trainer = start(settings(models(family), validation_prompt=prompts), tmp_path)
    save_grid(tmp_path / "grid.png", trainer.state)
    plain, guided = shown
    assert plain == title
    assert guided.startswith("negative of step 0, guidance_scale = ")


def test_beta_outside_its_range_is_forced(sample, shown):
    assert sample("unconditional", "--beta", 1, 1.5, -0.5, "--force") == 0
    assert {column for _, column in shown} >= {"negative, beta = 1.5", "negative, beta = -0.5"}


def test_every_prompt_is_shown(sample, shown):
    assert sample("class_conditional", "--prompt", *range(6)) == 0
    assert all(len(images) == 6 for images in shown.values())


def test_prompts_that_are_left_over_are_told(sample, capsys):
    assert sample("class_conditional", "--prompt", 1, 2, 3, "--num_images", 2) == 0
    assert "note: num_images is 2, so not all 3 prompts are used" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_videos_lie_side_by_side(sample, tmp_path, suffix):
    assert sample("cogvideox", "--output", f"video{suffix}", "--fps", 5) == 0
    size, frames, seconds = read_video(tmp_path / f"video{suffix}")
    assert size[0] == 2 * 256 + 4  # a video and a video, enlarged, of two prompts
    assert size[1] > 2 * 256 + 4
    assert len(frames) == 9
    assert seconds == pytest.approx(9 / 5, abs=0.01)
    plain, guided = np.split(frames[:, -512:].astype(float), [258], axis=2)
    assert np.abs(plain[:, :, 2:] - guided[:, :, :256]).mean() > 1
    assert np.abs(np.diff(plain, axis=0)).mean(axis=(1, 2, 3)).min() > 1  # it moves
    assert [path.name for path in tmp_path.iterdir()] == [f"video{suffix}"]


@pytest.mark.parametrize(
    ("family", "flags", "sentence"),
    [
        ("unconditional", ["--guidance_scale", 2, 1], "guidance_scale is 1.0; expected a value above 1"),
        ("unconditional", ["--guidance_scale", 0.5], "the negative would have no effect"),
        ("unconditional", ["--guidance_scale", "nan"], "guidance_scale is nan; expected a value above 1"),
        ("unconditional", ["--guidance_scale", 2, 2], "guidance_scale is 2.0 2.0; expected different values"),
        ("unconditional", ["--beta", 0.5, 0.5], "beta is 0.5 0.5; expected different values"),
        ("unconditional", ["--beta"], "beta is empty; expected one or more values"),
        ("unconditional", ["--beta", 0.5, 1.5], "beta is 1.5; expected a value from 0 to 1, or any with --force"),
        ("unconditional", ["--beta", "inf", "--force"], "beta is inf; expected a finite number"),
        ("unconditional", ["--alpha", 0.5], "alpha is 0.5, but it only applies to a positive model; pass --positive"),
        ("unconditional", ["--alpha", -1, "--positive", "x"], "alpha is -1.0; expected a value from 0 to 1"),
        ("unconditional", ["--fps", 0], "fps is 0; expected a value from 1 to 60"),
        ("unconditional", ["--fps", 9], "fps is 9, but .png files do not move; leave it out"),
        ("cogvideox", ["--fps", 60], "fps is 60, but a GIF shows up to 50; choose a lower value or MP4"),
        ("unconditional", ["--num_images", 0], "num_images is 0; expected a value from 1"),
        ("unconditional", ["--output", "x.gif"], "ends in .png, because the model makes images"),
        ("unconditional", ["--output", "."], "output is .; expected a file name that ends in .png"),
        ("unconditional", ["--output", "/proc/x.png"], "output /proc/x.png cannot be written"),
        ("unconditional", ["--positive", "nowhere"], "nowhere was not found locally or on the hub"),
        ("unconditional", ["--num_images", 1001], "from 1 to 1000; pass --output_dir for more"),
        ("class_conditional", ["--prompts", "p.txt"], "prompt and prompts are both given; leave one of the two out"),
        ("unconditional", ["--prompts", "p.txt"], "prompts p.txt could not be read: No such file or directory"),
        ("unconditional", ["--output", "x.png", "--output_dir", "x"], "output and output_dir are both given"),
        (
            "unconditional",
            ["--output_dir", "x", "--video_format", "gif"],
            "video_format is gif, which is only for videos in an output_dir",
        ),
        ("cogvideox", ["--video_format", "gif"], "video_format is gif, which is only for videos in an output_dir"),
        ("unconditional", ["--output_dir", "/dev/null/x"], "output_dir is /dev/null/x, but /dev/null is a file"),
        ("unconditional", ["--output_dir", "/proc/x"], "output_dir /proc/x cannot be written"),
        ("cogvideox", ["--output", "x.webm"], "expected a file name that ends in .png, .gif or .mp4"),
        ("cogvideox", ["--output", "x.gif", "--beta", 0.5, 1], "ends in .png, because a sweep is written as one picture"),
        ("cogvideox", ["--num_frames", 8], "num_frames is 8; expected a multiple of 4 plus 1"),
    ],
)
def test_mistakes_are_named(sample, tmp_path, capsys, family, flags, sentence):
    assert sample(family, *flags) == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert sentence in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_mp4_is_optional(sample, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert sample("cogvideox", "--output", "x.mp4") == 2
    assert "run pip install 'selfnpo[video]', or choose a name that ends in .gif" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_asked(sample, tmp_path, capsys):
    (tmp_path / "samples.png").write_text("mine")
    assert sample("unconditional", "--output", "samples.png") == 2
    assert "samples.png exists; choose another name or pass --overwrite" in capsys.readouterr().err
    assert [sample("unconditional"), sample("unconditional")] == [0, 0]
    assert "written to samples-3.png" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-2.png", "samples-3.png", "samples.png"]
    assert (tmp_path / "samples.png").read_text() == "mine"
    assert sample("unconditional", "--overwrite") == 0
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 500


def test_a_picture_says_how_it_was_made(sample, tmp_path, models):
    assert sample("stable_diffusion", "--prompt", "a cat", "ein Käfer\n" * 300, "--guidance_scale", 3) == 0
    with Image.open(tmp_path / "samples.png") as picture:
        settings = json.loads(picture.text["selfnpo"])
    assert settings["prompts"] == ["a cat", "ein Käfer\n" * 300] * 2
    assert settings["pretrained_model_name_or_path"] == str(models("stable_diffusion"))
    assert (settings["guidance_scale"], settings["beta"], settings["seed"]) == ([3], [1], 0)


def test_prompts_come_from_a_file(sample, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "selfnpo.sampling.comparison.save_comparison", lambda path, panels, columns, caption, labels, _: asked.extend(labels)
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a dog"}\n\n"a cat"\n')
    assert sample("stable_diffusion", "--prompt", "--prompts", tmp_path / "prompts.jsonl") == 0
    assert asked == ["a dog", "a cat", "a dog", "a cat"]
    (tmp_path / "classes.txt").write_text("2\n0\n")
    asked.clear()
    assert sample("class_conditional", "--prompt", "--prompts", tmp_path / "classes.txt") == 0
    assert asked == ["2", "0", "2", "0"]


@pytest.mark.parametrize("format", ["gif", "mp4"])
def test_a_video_says_how_it_was_made(sample, tmp_path, format):
    assert sample("cogvideox", "--output", f"x.{format}") == 0
    assert sample("cogvideox", "--output_dir", "out", "--num_images", 1, "--video_format", format) == 0
    for path, prompt in ((f"x.{format}", ["a cat", "a dog"]), (f"out/negative/0000.{format}", "a cat")):
        if format == "gif":
            with Image.open(tmp_path / path) as gif:
                text = gif.info["comment"]
                assert gif.n_frames == 9
        else:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / path, "-f", "ffmetadata", "-"]
            found = subprocess.run(command, capture_output=True, check=True).stdout.decode()
            text = re.sub(r"\\(.)", r"\1", re.search(r"^comment=(.*)$", found, re.MULTILINE)[1])
        settings = json.loads(text)
        assert prompt in (settings.get("prompt"), settings.get("prompts"))
