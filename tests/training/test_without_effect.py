"""Settings that would change nothing are refused, and only those."""

import dataclasses
from dataclasses import replace

import pytest
import yaml

from commands import call
from selfnpo.config import PRESETS, TrainConfig, preset_config, to_yaml
from selfnpo.errors import UserError
from selfnpo.models import FAMILIES, SampleOptions, Source
from selfnpo.training.without_effect import AMONG_SETTINGS, RULES, check_effect

DEMO, SD, XL, VIDEO, PLAIN, CLASSES = (
    "demo", "stable_diffusion", "stable_diffusion_xl", "cogvideox", "unconditional", "class_conditional",
)  # fmt: skip


def refusal(models, family: str, **settings) -> str:
    name = "demo" if family == DEMO else str(models(family))
    config = TrainConfig(pretrained_model_name_or_path=name, **settings)
    try:
        check_effect(config, Source(config))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("family", "setting", "beside", "sentence", "instead"),
    [
        (SD, {"num_rollout_steps": 7}, {}, "only --rollout data uses it", {"rollout": "data"}),
        (SD, {"pool_size": 3}, {"rollout": "fresh"}, "only --rollout pool uses it", {"rollout": "pool"}),
        (SD, {"huber_c": 0.1}, {}, "only --loss huber uses it", {"loss": "huber"}),
        (SD, {"lora_alpha": 4.0}, {}, "only a LoRA uses it", {"rank": 4}),
        (SD, {"lora_target_modules": ("to_q",)}, {}, "only a LoRA uses it", {"rank": 4}),
        (SD, {"lr_warmup_steps": 9}, {"lr_scheduler": "constant"}, "has no warmup", {"lr_scheduler": "linear"}),
        (SD, {"checkpointing_minutes": 3.0}, {"checkpointing_steps": 9}, "replaces it", {"checkpointing_steps": 0}),
        (SD, {"logging_dir": "logs"}, {}, "only --report_to tensorboard uses it", {"report_to": "tensorboard"}),
        (SD, {"logging_dir": "logs"}, {"report_to": "wandb"}, "only --report_to", {"report_to": "tensorboard"}),
        (SD, {"hub_model_id": "a/b"}, {}, "only --push_to_hub uses it", {"push_to_hub": True}),
        (SD, {"overwrite": True}, {"resume_from_checkpoint": "latest"}, "nothing", {"resume_from_checkpoint": None}),
        (SD, {"condition_dropout": 0.5}, {}, "only has the null condition", {"prompts": "p.txt"}),
        (SD, {"rollout_guidance_scale": 3.0}, {}, "only has the null condition", {"prompt_dataset": "a:b"}),
        (PLAIN, {"condition_dropout": 0.5}, {}, "only has the null condition", None),
        (SD, {"prompts": "p.txt"}, {"condition_dropout": 1.0}, "no prompt is used", {"rollout_guidance_scale": 1.0}),
        (PLAIN, {"prompts": "p.txt"}, {}, "the model takes no prompts", None),
        (CLASSES, {"prompt_dataset": "a:b"}, {}, "the model takes no prompts", None),
        (DEMO, {"prompts": "p.txt"}, {}, "the model is the embedded demo; pass your own with --pretrained", None),
        (DEMO, {"train_data_dir": "images"}, {"rollout": "data"}, "the model is the embedded demo; pass your own", None),
        (DEMO, {"validation_prompt": ("3",)}, {}, "its own comparison", {"validation_steps": 5}),
        (DEMO, {"num_validation_images": 2}, {}, "its own comparison", {"validation_steps": 5}),
        (DEMO, {"validation_guidance_scale": 2.0}, {}, "its own comparison", {"validation_steps": 5}),
    ],
)  # fmt: skip
def test_each_is_named_with_what_would_use_it(models, family, setting, beside, sentence, instead):
    said = refusal(models, family, **setting, **beside)
    ((name, value),) = setting.items()
    assert said.startswith(f"{name} is {' '.join(value) if isinstance(value, tuple) else value}, but ")
    assert sentence in said
    if instead is not None:
        assert refusal(models, family, **setting, **(beside | instead)) == ""


def test_the_table_above_covers_every_rule():
    covered = {
        name for mark in test_each_is_named_with_what_would_use_it.pytestmark for row in mark.args[1] for name in row[1]
    }
    assert covered == {name for rule in RULES for name in rule.names}


@pytest.mark.parametrize(
    ("family", "setting", "sentence"),
    [
        (SD, {"num_frames": 5}, "num_frames is 5, but stable-diffusion models do not support it"),
        (SD, {"target_size": (8, 8)}, "but stable-diffusion models do not support it"),
        (VIDEO, {"crops_coords_top_left": (1, 1)}, "but cogvideox models do not support it"),
        (PLAIN, {"original_size": (8, 8)}, "but unconditional models do not support it"),
        (SD, {"resolution": 64, "height": 64, "width": 32}, "height and width are given too"),
        (SD, {"lora_scale": 0.5}, "no LoRA is merged into the base"),
        (SD, {"revision": "main"}, "is not on the hub; leave it out"),
        (SD, {"single_file_config": "x"}, "is not a single file; leave it out"),
        (DEMO, {"resolution": 64}, "resolution is 64, but the model is the embedded demo"),
        (DEMO, {"height": 64}, "the model is the embedded demo"),
        (DEMO, {"variant": "fp16"}, "the model is the embedded demo"),
        (DEMO, {"lora_name_or_path": "x"}, "the model is the embedded demo"),
    ],
)
def test_options_of_models(models, family, setting, sentence):
    assert sentence in refused_source(models, family, **setting)


def refused_source(models, family: str, **settings) -> str:
    name = "demo" if family == DEMO else str(models(family))
    with pytest.raises(UserError) as error:
        Source(TrainConfig(pretrained_model_name_or_path=name, **settings))
    assert "weights" not in str(error.value)  # no path inside the package
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        (XL, {"original_size": (64, 64)}),
        (XL, {"crops_coords_top_left": (1, 1)}),
        (VIDEO, {"num_frames": 5}),
        (SD, {"resolution": 64, "height": 32}),
        (SD, {"lora_scale": 0.5, "lora_name_or_path": "x"}),
        (XL, {"rollout_guidance_scale": 2.0}),  # whose null condition is not the empty prompt
        (CLASSES, {"condition_dropout": 0.5}),
    ],
)
def test_what_has_an_effect_is_accepted(models, family, setting):
    assert refusal(models, family, **setting) == ""


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("sample", ("--num_frames", 5), "num_frames is 5, but stable-diffusion models do not support it; leave it out"),
        ("sample", ("--lora_scale", 0.5), "lora_scale is 0.5, but no LoRA is merged into the base"),
        ("merge", ("--single_file_config", "x"), "single_file_config is x, but "),
    ],
)
def test_options_of_models_in_other_commands(models, tmp_path, capsys, monkeypatch, command, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert call(command, "--pretrained_model_name_or_path", models(SD), "--negative", models(SD), *flags) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_family_names_options_that_exist():
    names = {field.name for field in dataclasses.fields(SampleOptions)}
    assert all(set(family.sample_options) <= names for family in FAMILIES)


@pytest.mark.parametrize("family", [DEMO, SD, XL, VIDEO, PLAIN, CLASSES])
@pytest.mark.parametrize("rank", [0, 4])
def test_presets_and_the_files_of_their_runs_are_accepted(models, tmp_path, family, rank):
    name = "demo" if family == DEMO else str(models(family))
    for preset in PRESETS:
        source = Source(TrainConfig(pretrained_model_name_or_path=name))
        config = replace(
            preset_config(preset, source.family.presets, rank > 0), pretrained_model_name_or_path=name, rank=rank
        )
        check_effect(config, source)
        values = yaml.safe_load(to_yaml(config))
        assert values["preset"] == preset
        for other in PRESETS:  # a file beside another preset on the command line
            for known in (source, None):
                check_effect(replace(config, preset=other, config=tmp_path / "config.yaml"), known)


def test_what_is_checked_without_a_model_has_no_default_of_a_family():
    of_families = {name for family in FAMILIES for preset in family.presets.values() for name in preset}
    assert not of_families & {"rollout", "loss", *(name for rule in AMONG_SETTINGS for name in rule.names)}


def test_a_flag_is_refused_before_anything_is_written(tmp_path, capsys):
    assert call("train", "--output_dir", tmp_path / "out", "--num_rollout_steps", 7) == 2
    said = capsys.readouterr()
    assert said.err.endswith("error: num_rollout_steps is 7, but only --rollout data uses it; add that or leave it out\n")
    assert said.out == ""  # not even PyTorch was loaded
    assert not (tmp_path / "out").exists()
