"""The lines with which a run begins."""

from dataclasses import replace
from typing import get_args

import pytest

from commands import call
from selfnpo.config import TrainConfig, parse_config
from selfnpo.device import resolve
from selfnpo.inputs.data import TrainData, read_data
from selfnpo.models import Source
from selfnpo.training.summary import _ROLLOUTS, summary


def lines(models, family: str, *flags: object, prompts: int = 1) -> dict[str, str]:
    config = parse_config(["--pretrained_model_name_or_path", str(models(family)), *map(str, flags)])
    config = replace(config, mixed_precision=resolve(config.mixed_precision))
    data = TrainData([""] if prompts == 1 else [str(number) for number in range(prompts)], [], [])
    return dict(line.split(maxsplit=1) for line in summary(config, Source(config), data).splitlines())


def test_the_values_are_those_of_preset_and_family(models):
    told = lines(models, "stable_diffusion", "--prompts", "p.txt", "--output_dir", "runs/x", prompts=1234)
    assert told == {
        "model": f"{models('stable_diffusion')} (stable-diffusion), preset default",
        "trains": "all weights",
        "on": "1,234 prompts",
        "rollouts": "pool: 8 batches of trajectories, which take turns at one step each; grid of 25 points, unconditional",
        "reference": "moving average of the student, decay 0.999",
        "loss": "L2, weighted as epsilon; 10 % of the conditions dropped",
        "optimizer": "AdamW, learning rate 1e-06, constant; weight decay 0.001, gradient norm at most 1",
        "steps": "1,000 of 20 samples in float32",
        "results": "runs/x",
    }


def test_flags_show(models):
    told = lines(
        models, "stable_diffusion_xl", "--preset", "paper", "--rank", 4, "--train_batch_size", 2,
        "--gradient_accumulation_steps", 5, "--max_relative_delta", 0.05, "--use_8bit_adam", "--lr_scheduler", "cosine",
        "--lr_warmup_steps", 50, "--rollout_guidance_scale", 3, "--loss", "huber",
    )  # fmt: skip
    assert told["trains"] == "a LoRA of rank 4"
    assert told["on"] == "only the empty prompt"
    assert told["rollouts"] == "fresh: from noise to a random time; grid of 25 points, guidance scale 3"
    assert told["reference"] == "the frozen base"
    assert told["loss"].startswith("pseudo-Huber, c 0.001, weighted as x0; 0 %")
    assert told["optimizer"].startswith("8-bit AdamW, learning rate 0.0001, cosine after 50 steps of warmup")
    assert told["steps"] == (
        "1,000 of 10 samples (5 x 2) in float32, gradients checkpointed, or until the weights have moved by 5 %"
    )


def test_every_rollout_has_words():
    assert set(get_args(TrainConfig.__annotations__["rollout"].__origin__)) == set(_ROLLOUTS)


@pytest.mark.parametrize(("family", "on"), [("unconditional", "no conditions"), ("class_conditional", "10 classes")])
def test_what_it_trains_on(models, family, on):
    assert lines(models, family)["on"] == on


def test_images(models, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    config = TrainConfig(
        pretrained_model_name_or_path=str(models("stable_diffusion")),
        preset="released",
        rollout="data",
        train_data_dir=tmp_path,
    )
    source = Source(config)
    assert "\non         1 image, with only the empty prompt\n" in summary(config, source, read_data(config, source))


def test_a_run_begins_with_them(models, tmp_path, capsys):
    model = ("--pretrained_model_name_or_path", models("unconditional"), "--output_dir", tmp_path / "out")
    assert call("train", *model, "--max_train_steps", 1, "--train_batch_size", 1, "--pool_size", 1) == 0
    said = capsys.readouterr().out
    assert said.startswith("loading PyTorch and diffusers\nmodel      ")
    assert said.index("steps      1 of 1 samples") < said.index("memory plan: ")
