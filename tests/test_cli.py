"""The commands as a user meets them: what they write."""

import dataclasses
import importlib.machinery
import importlib.metadata
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiTTransformer2DModel
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands import QUICK, call
from selfnpo import train
from selfnpo.cli import parse
from selfnpo.config import PRESETS, TrainConfig, parse_config, preset_config
from selfnpo.demo.evaluation import evaluate
from selfnpo.models import DEMO_FOLDER, FAMILIES
from selfnpo.output import RESULTS


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert call("train", *QUICK, "--output_dir", output) == 0
    return output


def test_a_run_leaves_a_diffusers_folder_its_settings_and_its_cost(trained, demo):
    assert {path.name for path in trained.iterdir()} == {
        "negative",
        "config.yaml",
        "metrics.json",
        "log.jsonl",
        "samples",
        "checkpoint-4",
    }
    negative = DiTTransformer2DModel.from_pretrained(trained / "negative")
    assert any(not a.equal(b) for a, b in zip(negative.parameters(), demo.denoiser.parameters(), strict=True))
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["status"] == "completed"
    assert metrics["cost"]["samples"] == 32
    filling = sum(slot * 25 // 64 + 1 for slot in range(64))  # 8 batches of 8 trajectories, staggered over 25 times
    assert metrics["cost"]["reference_evaluations_per_sample"] == 1 + filling / 32
    assert json.loads((trained / "log.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_config_yaml_repeats_the_run(trained, tmp_path):
    assert call("train", "--config", trained / "config.yaml", "--output_dir", tmp_path / "again") == 0
    one, other = ((path / "negative" / "diffusion_pytorch_model.safetensors") for path in (trained, tmp_path / "again"))
    assert one.read_bytes() == other.read_bytes()


def test_flags_beat_the_file_and_the_file_beats_the_preset(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("preset: paper\nlearning_rate: 3.0e-6\ntrain_batch_size: 7\ncompile: true\nmax_relative_delta: null\n")
    config = parse_config(["--config", str(file), "--train_batch_size", "9"])
    assert (config.preset, config.rollout) == ("paper", "fresh")
    assert (config.learning_rate, config.train_batch_size, config.compile, config.max_relative_delta) == (
        3e-6,
        9,
        True,
        None,
    )
    assert parse_config(["--preset", "released"]).rollout == "data"


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("model", "pretrained_model_name_or_path", str(DEMO_FOLDER)),
        ("pretrained_teacher_model", "pretrained_model_name_or_path", str(DEMO_FOLDER)),
        ("teacher_revision", "revision", "main"),
        ("base_weights", "lora_name_or_path", "lora"),
        ("base_weights_multiplier", "lora_scale", 0.5),
        ("resume", "resume_from_checkpoint", "latest"),
        ("network_dim", "rank", 8),
        ("lora_rank", "rank", 8),
        ("network_alpha", "lora_alpha", 4.0),
        ("num_ddim_timesteps", "num_inference_steps", 50),
        ("proportion_empty_prompts", "condition_dropout", 0.5),
        ("caption_dropout_rate", "condition_dropout", 0.5),
        ("loss_type", "loss", "huber"),
        ("sample_every_n_steps", "validation_steps", 7),
        ("save_every_n_steps", "checkpointing_steps", 7),
        ("log_with", "report_to", "tensorboard"),
        ("huggingface_repo_id", "hub_model_id", "somebody/negative"),
    ],
)
def test_names_of_other_scripts(alias, name, value):
    assert getattr(parse(TrainConfig, [f"--{alias}", str(value)]), name) == value


def test_the_demo_judges_its_negative_and_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "selfnpo.demo.run_report.evaluate", lambda *args, num_samples, **kw: evaluate(*args, num_samples=200, **kw)
    )
    assert call("train", "--max_train_steps", 30, "--output_dir", tmp_path / "out") == 0
    assert set(RESULTS) - {"tensorboard", "wandb", "samples"} <= {path.name for path in (tmp_path / "out").iterdir()}
    said = capsys.readouterr().out
    assert said.startswith("no model was given with --pretrained_model_name_or_path, so this trains the embedded demo\n")
    assert "guidance_scale = 3" in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert "recall" in report
    assert "30 steps of 128 samples" in report
    assert imread(tmp_path / "out" / "comparison.png").shape[1] > 1000
    quality = json.loads((tmp_path / "out" / "metrics.json").read_text())["quality"]
    assert quality.keys() == {"none", "cfg", "self-npo"}


def test_tensorboard_is_optional(tmp_path, monkeypatch, capsys):
    flags = ("--report_to", "tensorboard", "--logging_steps", 2)
    assert call("train", *QUICK, "--output_dir", tmp_path / "out", *flags) == 0
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [2, 4]
    assert [event.step for event in board.Images("samples")] == [4]  # also the one after the last step
    (tmp_path / "file").touch()
    flags += ("--overwrite", "--logging_dir")
    assert call("train", *QUICK, "--output_dir", tmp_path / "out", *flags, "logs") == 0
    assert list((tmp_path / "out" / "logs").glob("events.*"))
    assert call("train", *QUICK, "--output_dir", tmp_path / "out", *flags, tmp_path / "file") == 2
    assert f"logging_dir {tmp_path / 'file'} cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert call("train", *QUICK, "--output_dir", tmp_path / "other", "--report_to", "tensorboard") == 2
    assert "pip install 'selfnpo[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


class FakeWandb:
    """What accelerate calls of wandb."""

    __spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb")

    def __init__(self):
        self.started, self.logged, self.finished = {}, [], False

    def init(self, **settings):
        self.started = settings
        return self

    def log(self, values, step):
        assert not self.finished
        self.logged.append((step, values))

    def finish(self):
        self.finished = True

    @staticmethod
    def Image(pixels):
        return pixels.shape


def test_wandb_gets_numbers_and_pictures(tmp_path, monkeypatch, capsys):
    flags = ("--output_dir", tmp_path / "out", "--report_to", "wandb", "--logging_steps", 2)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "wandb", None)
        assert call("train", *QUICK, *flags) == 2
        assert "report_to is wandb, which is not installed; run pip install 'selfnpo[wandb]'" in capsys.readouterr().err
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert call("train", *QUICK, *flags) == 0
    assert fake.started == {"project": "selfnpo", "name": "out", "dir": str(tmp_path / "out")}
    assert [step for step, _ in fake.logged] == [2, 4, 4]
    (shape,) = fake.logged[-1][1]["samples"]
    assert shape[-1] == 3
    assert fake.finished
    fake.init = lambda **settings: 1 / 0
    assert call("train", *QUICK, *flags, "--overwrite") == 2
    assert "report_to is wandb, but it could not be started (division by zero); run wandb login" in capsys.readouterr().err


def test_a_folder_of_logs_is_no_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if importlib.metadata.packages_distributions().get("wandb"):
        pytest.skip("wandb is installed")
    assert call("train", *QUICK, "--output_dir", tmp_path / "out", "--report_to", "wandb") == 2
    assert "run pip install 'selfnpo[wandb]'" in capsys.readouterr().err


def test_help_says_what_preset_and_model_decide(capsys):
    decided = {field.name for field in dataclasses.fields(TrainConfig) if field.name != "preset" and varies(field.name)}
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(TrainConfig):
        block = re.search(rf"--{field.name}(?:,|\]| [A-Z{{\[]).*?\((default: .*?|optional|sets: .*?)\)", text)[0]
        assert ("set by the preset and the model;" in block) == (field.name in decided), block


def varies(name: str) -> bool:
    families = [family.presets for family in FAMILIES]
    values = [getattr(preset_config(*each), name) for each in itertools.product(PRESETS, families, (False, True))]
    return any(value != getattr(TrainConfig(), name) for value in values)


def test_sample_writes_a_picture(trained, tmp_path):
    output = tmp_path / "grid.png"
    args = ("--negative", trained / "negative", "--num_images", 20, "--output", output)
    assert call("sample", *args) == 0
    first = imread(output)
    assert np.ptp(first) > 0.5
    assert call("sample", *args, "--overwrite", "--beta", 0, "--guidance_scale", 4) == 0
    assert not np.array_equal(first, imread(output))


def test_evaluate_writes_table_and_plot(trained, tmp_path, capsys):
    output = tmp_path / "evaluation"
    args = (
        "--negative",
        trained / "negative",
        "--arms",
        "random",
        "--num_samples",
        200,
        "--seeds",
        1,
        2,
        "--output_dir",
        output,
    )
    assert call("evaluate", *args) == 0
    text = (output / "evaluation.md").read_text()
    assert text in capsys.readouterr().out
    assert "All replicates use the same negative model" in text
    content = json.loads((output / "evaluation.json").read_text())
    assert content["values"].keys() == {"none", "cfg", "self-npo", "random"}
    assert imread(output / "precision_recall.png").size > 10_000


def test_base_writes_a_model_like_the_one_that_ships(tmp_path):
    assert call("base", "--output_dir", tmp_path / "base", "--max_train_steps", 3) == 0
    shipped, made = (
        json.loads((folder / "transformer" / "config.json").read_text()) for folder in (DEMO_FOLDER, tmp_path / "base")
    )
    assert {**shipped, "_diffusers_version": None} == {**made, "_diffusers_version": None}
    assert call("base", "--output_dir", tmp_path / "base", "--max_train_steps", 3) == 2  # it is kept unless asked
    assert (
        call("train", *QUICK[:4], "--pretrained_model_name_or_path", tmp_path / "base", "--output_dir", tmp_path / "out")
        == 0
    )


def test_every_setting_is_documented():
    """tyro shows the docstring under a field as its help; one is missing where the source has two fields in a row."""
    package = Path(train.__file__).parent
    source = "".join((package / name).read_text() for name in ("config.py", "options.py"))
    for field in dataclasses.fields(TrainConfig):
        line = source.index(f"    {field.name}: ")
        assert source[line:].split("\n")[1].strip().startswith('"""'), field.name
