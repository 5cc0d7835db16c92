"""What users get wrong with the commands: one sentence, exit code 2, and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from diffusers import DiTTransformer2DModel

from commands import QUICK, call
from selfnpo.models import DEMO_FOLDER


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--preset", "fast"], "preset is 'fast'; expected one of default, paper, released"),
        (["--max_train_steps", "many"], "max_train_steps is 'many'; expected a whole number"),
        (["--max_train_steps", "0"], "max_train_steps is 0; expected a value from 1"),
        (["--learning_rate", "-1e-4"], "learning_rate is -0.0001; expected a value from 0"),
        (["--learning_rate", "nan"], "learning_rate is nan; expected"),
        (["--num_inference_steps", "30"], "num_inference_steps is 30; expected a divisor of the 1000"),
        (["--rollout", "data", "--num_rollout_steps", "25"], "num_rollout_steps is 25; expected a value from 1 to 24"),
        (["--pool_size", "0"], "pool_size is 0; expected a value from 1 to 10000"),
        (["--max_relative_delta", "-1"], "expected a positive number"),
        (["--seed", "-1"], "seed is -1"),
        (["--checkpointing_minutes", "0"], "checkpointing_minutes is 0.0; expected a value from 0.01 to 100000"),
        (["--checkpointing_steps", "-5"], "checkpointing_steps is -5; expected a value from 0 to 10000000"),
        (["--config", "absent.yaml"], "config absent.yaml could not be read"),
        (["--resume_from_checkpoint", "latest"], "has no intact checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint is nowhere, which is not a folder"),
        (["--output_dir", "/proc/selfnpo"], "output_dir /proc/selfnpo cannot be written"),
        (
            ["--pretrained_model_name_or_path", "nothing/here"],
            "nothing/here was not found locally or on the hub; expected a diffusers folder",
        ),
    ],
)
def test_mistakes_in_training_are_named(args, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train", *QUICK, "--output_dir", "out", *args) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("learning_rat: 1", "--learning_rat"),
        ("learning_rate: fast", "learning_rate is 'fast'; expected a number"),
        ("- 1", "contains no settings"),
        ("a: [", "could not be read as YAML"),
        ("max_train_steps: -5", "max_train_steps is -5"),
    ],
)
def test_mistakes_in_a_config_file_are_named(content, sentence, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(content)
    assert call("train", "--config", tmp_path / "c.yaml", "--output_dir", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_kept_unless_asked_and_foreign_files_always(tmp_path, capsys):
    output = tmp_path / "out"
    assert call("train", *QUICK, "--output_dir", output) == 0
    (output / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert call("train", *QUICK, "--output_dir", output) == 2
    error = capsys.readouterr().err
    assert "exists and is not empty" in error
    assert "--overwrite" in error
    assert "--resume_from_checkpoint latest" in error
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert call("train", *QUICK, "--output_dir", output, "--overwrite", "--seed", 5) == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 5


def damage(folder: Path, kind: str) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "foreign":
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
            patch_size=8, num_embeds_ada_norm=10, norm_num_groups=1,
        ).save_pretrained(folder)  # fmt: skip
    elif kind == "another config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    elif kind == "pickle":
        weights.rename(folder / "diffusion_pytorch_model.bin")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "broken config":
        (folder / "config.json").write_text("{")
    elif kind == "not finite":
        model = DiTTransformer2DModel.from_pretrained(folder)
        next(model.parameters()).data.fill_(float("nan"))
        model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated", "could not be read as safetensors"),
        ("foreign", "a different architecture than the base"),
        ("another config", "has a different architecture than the base"),
        ("pickle", "in a format that can run code when it is opened; convert them once"),
        ("no config", "contains neither config.json"),
        ("broken config", "could not be read"),
        ("not finite", "inf or NaN"),
    ],
)
def test_damaged_and_foreign_weights_are_refused(kind, sentence, tmp_path, capsys):
    folder = tmp_path / "negative"
    shutil.copytree(DEMO_FOLDER / "transformer", folder)
    damage(folder, kind)
    assert call("sample", "--negative", folder, "--output", tmp_path / "grid.png") == 2
    captured = capsys.readouterr().err
    assert sentence in captured.strip().splitlines()[-1]
    assert "Traceback" not in captured
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("command", "args", "sentence"),
    [
        ("sample", ["--beta", "2"], "beta is 2.0; expected a value from 0 to 1"),
        ("sample", ["--guidance_scale", "1"], "guidance_scale is 1.0; expected a value above 1"),
        ("sample", ["--output", "grid.jpg"], "ends in .png"),
        ("sample", ["--output", "no/such/grid.png"], "does not exist"),
        ("sample", ["--num_inference_steps", "7"], "num_inference_steps is 7"),
        ("evaluate", ["--num_samples", "3"], "num_samples is 3"),
        ("evaluate", ["--guidance_scales", "1"], "expected values above 1"),
        ("evaluate", ["--seeds", "1", "1"], "different non-negative"),
        ("evaluate", ["--arms", "early"], "expected self-npo among them"),
        ("evaluate", ["--arms", "best"], "arms is 'best'; expected one or more values, each one of self-npo, fresh"),
        ("evaluate", ["--negative", "nowhere"], "nowhere was not found locally"),
        ("base", [], "output_dir"),
        ("base", ["--output_dir", "out", "--max_train_steps", "0"], "max_train_steps is 0"),
        ("base", ["--output_dir", "/proc/selfnpo"], "cannot be written"),
    ],
)
def test_mistakes_in_other_commands_are_named(command, args, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command == "sample":
        args = ["--negative", str(DEMO_FOLDER / "transformer"), *args]
    assert call(command, *args) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "sentence"), [("cuda", "is 'cuda'; expected one of"), ("triton", "runs on CUDA devices")])
def test_a_backend_that_cannot_run_is_said_before_anything_is_written(name, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SELFNPO_BACKEND", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert call("train", *QUICK, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "unset SELFNPO_BACKEND" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sample", "merge"])
def test_the_default_negative_is_named_for_other_models(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(command, "--model", tmp_path) == 2
    assert capsys.readouterr().out == "no negative was given with --negative, so this takes runs/demo/negative\n"
