"""The loop: known losses, exact resume, stopping, and what a crash leaves behind."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from commands import call
from fine_tunes import WEIGHTS
from fixed_batch import losses_on_a_fixed_batch
from runs import SHORT, assert_same_state
from selfnpo.config import TrainConfig, preset_config
from selfnpo.demo.baselines import ShuffledLabels
from selfnpo.errors import UserError
from selfnpo.inputs.digits import halves
from selfnpo.models import DEMO_FOLDER
from selfnpo.output import list_checkpoints
from selfnpo.training.trainer import Trainer, resume_command


def train(config, demo, output_dir=None):
    if output_dir is not None:
        output_dir.mkdir(exist_ok=True)
    trainer = Trainer(config, demo, output_dir)
    return trainer, trainer.run()


def log_of(output_dir):
    rows = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "samples_per_second"} for row in rows]


@pytest.mark.parametrize("changes", [{}, {"compile": True}])
def test_a_rollout_without_a_reference_trains(demo, changes):
    config = replace(SHORT, **changes)
    labels = ShuffledLabels(halves("development")[0], config.train_batch_size, config.seed, config.num_inference_steps)
    trainer = Trainer(config, demo, rollout=labels)
    assert trainer.run() == "completed"
    assert trainer.state.reference_evaluations == 0
    assert trainer.state.student.relative_delta() > 0


def test_golden_losses(demo):
    """The whole step, pinned: whoever changes these numbers changed the mathematics or the random numbers."""
    trainer = Trainer(TrainConfig(max_train_steps=40, train_batch_size=32), demo)
    losses = [trainer.train_step()[0].item() for _ in range(40)]
    assert losses[-4:] == pytest.approx([0.0126078, 0.0188468, 0.0263009, 0.0051059], rel=1e-3)


@pytest.mark.parametrize("mode", ["pool", "fresh", "data"])
def test_resume_is_exact(demo, tmp_path, mode):
    config = replace(SHORT, rollout=mode)
    straight, _ = train(config, demo, tmp_path / "straight")
    train(config, demo, tmp_path / "broken")
    for folder in list_checkpoints(tmp_path / "broken")[1:]:  # as if the run had died after its second checkpoint
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed, ending = train(replace(config, resume_from_checkpoint="latest"), demo, tmp_path / "broken")
    assert ending == "completed"
    assert_same_state(straight, resumed)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "broken")
    assert [path.name for path in list_checkpoints(tmp_path / "broken")] == ["checkpoint-8", "checkpoint-12"]


def test_a_damaged_latest_checkpoint_is_passed_over(demo, tmp_path, capsys):
    straight, _ = train(SHORT, demo, tmp_path)
    newest = list_checkpoints(tmp_path)[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed, _ = train(replace(SHORT, resume_from_checkpoint="latest"), demo, tmp_path)
    assert_same_state(straight, resumed)
    assert "checkpoint-12 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "made with seed = 0, got 1"),
        ({"learning_rate": 1e-3}, "learning_rate = 0.0001, got 0.001"),
        ({"max_train_steps": 20}, "max_train_steps = 12, got 20"),
    ],
)
def test_another_run_cannot_resume_a_checkpoint(demo, tmp_path, change, message):
    train(SHORT, demo, tmp_path)
    with pytest.raises(UserError, match=message):
        Trainer(replace(SHORT, resume_from_checkpoint="latest", **change), demo, tmp_path)


def test_nothing_to_resume(demo, tmp_path):
    with pytest.raises(UserError, match="has no intact checkpoint; start without"):
        Trainer(replace(SHORT, resume_from_checkpoint="latest"), demo, tmp_path)


def test_the_base_stays_as_it_was(demo):
    before = {name: parameter.clone() for name, parameter in demo.denoiser.named_parameters()}
    for decay in (0.999, 1.0):
        trainer, _ = train(replace(SHORT, reference_decay=decay), demo)
        assert trainer.state.relative_delta() > 0
        assert all(parameter.equal(before[name]) for name, parameter in demo.denoiser.named_parameters())


def test_the_reference_is_an_average_of_the_student(demo):
    trainer = Trainer(replace(SHORT, reference_decay=0.9), demo)
    expected = [parameter.clone() for parameter in demo.denoiser.parameters()]
    for _ in range(3):
        trainer.train_step()
        expected = [
            0.9 * old + 0.1 * new.detach()
            for old, new in zip(expected, trainer.state.student.trainable.values(), strict=True)
        ]
    for average, reference in zip(expected, trainer.state.student.averaged.values(), strict=True):
        torch.testing.assert_close(average, reference)


def test_it_stops_at_the_strength_asked_for(demo):
    trainer, ending = train(replace(SHORT, max_relative_delta=1e-3), demo)
    assert ending == "strength reached"
    assert trainer.state.step < SHORT.max_train_steps
    assert trainer.state.relative_delta() >= 1e-3


def test_divergence_is_said_and_the_last_good_checkpoint_named(demo, tmp_path):
    trainer = Trainer(SHORT, demo, tmp_path)
    for _ in range(4):
        trainer.train_step()
    trainer._checkpoint()
    with torch.no_grad():
        next(iter(trainer.state.student.trainable.values())).fill_(float("nan"))
    with pytest.raises(UserError, match=r"diverged by step 6 .*lower learning_rate.*checkpoint-4"):
        trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_how_far_the_weights_have_moved_is_told_every_hundred_steps_and_where_it_is_asked_for(
    demo, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("selfnpo.training.trainer.DELTA_STEPS", 5)

    def told(name, **changes):
        trainer, _ = train(replace(SHORT, **changes), demo, tmp_path / name)
        assert (moved := log_of(tmp_path / name)[-1]["relative_delta"]) == trainer.state.student.relative_delta()
        assert f"moved={moved:.2%}" in capsys.readouterr().err.splitlines()[-1]
        return [row["step"] for row in log_of(tmp_path / name) if row["relative_delta"] is not None]

    monkeypatch.setattr("selfnpo.training.trainer.tqdm", lambda **options: tqdm(**(options | {"disable": False})))
    assert told("full") == [6, 10, 12]  # the first rows after 5 and 10, and the last one
    assert told("often", logging_steps=1, max_train_steps=11) == [5, 10, 11]
    assert told("seldom", logging_steps=6) == [6, 12]
    assert told("limited", max_relative_delta=0.9) == [2, 4, 6, 8, 10, 12]
    assert told("lora", rank=2) == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("preset", "loss", "last_loss", "moved"),
    [
        ("default", "l2", 0.00327891, 8.70685e-6),
        ("default", "huber", 0.0314870, 8.76285e-6),
        ("paper", "l2", 1.36223, 20.4592e-6),
        ("paper", "huber", 0.767471, 20.3628e-6),
        ("released", "l2", 1.96972, 20.8142e-6),
        ("released", "huber", 0.772970, 20.5563e-6),
    ],
)
def test_golden_presets(demo, preset, loss, last_loss, moved):
    trainer = Trainer(replace(preset_config(preset), train_batch_size=8, loss=loss), demo)
    losses = [trainer.train_step()[0].item() for _ in range(3)]
    assert (losses[-1], trainer.state.relative_delta()) == pytest.approx((last_loss, moved), rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "value", "beside"),
    [
        ("seed", 1, {}),
        ("learning_rate", 2e-4, {}),
        ("lr_scheduler", "constant", {}),
        ("lr_warmup_steps", 2, {}),
        ("adam_beta1", 0.5, {}),
        ("adam_beta2", 0.5, {}),
        ("adam_weight_decay", 0.1, {}),
        ("adam_epsilon", 1e-4, {}),
        ("max_grad_norm", 1e-3, {}),
        ("rollout", "fresh", {}),
        ("rollout", "full", {"rollout": "fresh"}),
        ("rollout", "data", {"rollout": "fresh"}),
        ("pool_size", 3, {}),
        ("num_inference_steps", 10, {}),
        ("num_rollout_steps", 2, {"rollout": "data"}),
        ("rollout_guidance_scale", 1.0, {}),
        ("rollout_guidance_scale", 2.0, {"rollout_guidance_scale": 1.0}),
        ("reference_decay", 0.5, {}),
        ("condition_dropout", 0.9, {}),
        ("loss", "huber", {}),
        ("huber_c", 1e-2, {"loss": "huber"}),
        ("loss_weighting", "x0", {}),
    ],
)
def test_every_setting_changes_what_is_trained(demo, setting, value, beside):
    def trained(config):
        trainer = Trainer(replace(config, train_batch_size=8, max_train_steps=5), demo)
        for _ in range(3):
            trainer.train_step()
        return trainer.state.student.trainable.values()

    config = replace(SHORT, **beside)
    one, other = trained(config), trained(replace(config, **{setting: value}))
    assert not all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_compiled_training_is_the_same_training(demo):
    config = replace(SHORT, max_train_steps=8)
    plain, compiled = Trainer(config, demo), Trainer(replace(config, compile=True), demo)
    losses = [(plain.train_step()[0].item(), compiled.train_step()[0].item()) for _ in range(8)]
    for one, other in losses:
        assert other == pytest.approx(one, rel=1e-3)
    assert any(module._compiled_call_impl for module in compiled.state.student.model.modules())


def test_the_loss_falls_on_a_fixed_batch(demo):
    losses = losses_on_a_fixed_batch(
        Trainer(replace(SHORT, learning_rate=1e-3, rollout_guidance_scale=2.0, rollout="fresh"), demo), 30
    )
    assert losses[-1] < 0.5 * losses[0]


RUN = ["--pretrained_model_name_or_path", str(DEMO_FOLDER), "--train_batch_size", "16", "--checkpointing_steps", "5"]


def interrupt_after_step(monkeypatch, number: int, at: int) -> None:
    step = Trainer.train_step

    def interrupted(trainer):
        if trainer.state.step == at - 1:
            os.kill(os.getpid(), number)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_marked_resumable_run_and_no_traceback(tmp_path, monkeypatch, capsys, number):
    output = tmp_path / "run"
    interrupt_after_step(monkeypatch, number, 8)
    assert call("train", *RUN, "--output_dir", output) == 130
    said = capsys.readouterr()
    assert "interrupted after step 8; continue with\n  python -m selfnpo.train --config " in said.out
    assert "Traceback" not in said.err
    assert json.loads((output / "metrics.json").read_text())["status"] == "interrupted"
    assert not (output / "negative").exists()
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-5", "checkpoint-8"]


def test_the_command_that_is_printed_goes_on_with_the_run(models, tmp_path, monkeypatch, capsys):
    output = tmp_path / "a run"  # to be quoted
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    flags = (
        "--pretrained_model_name_or_path", models("stable_diffusion"), "--prompts", tmp_path / "prompts.txt", "--rank", 2,
        "--max_train_steps", 4, "--train_batch_size", 2, "--pool_size", 1, "--num_inference_steps", 10,
        "--output_dir", output,
    )  # fmt: skip
    with monkeypatch.context() as patched:
        interrupt_after_step(patched, signal.SIGINT, 2)
        assert call("train", *flags) == 130
    command = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "selfnpo.train"]
    assert call("train", *words[3:]) == 0
    assert json.loads((output / "metrics.json").read_text())["cost"]["steps"] == 4
    assert (output / "negative" / "negative_kohya.safetensors").is_file()


def test_the_command_that_goes_on_uploads_too():
    config = TrainConfig(output_dir=Path("out"), push_to_hub=True, hub_model_id="me/negative")
    assert resume_command(config).endswith("--resume_from_checkpoint latest --push_to_hub --hub_model_id me/negative")


# A run that is done only when it is killed.
ENDLESS = """
import time
from selfnpo import train
train.finish = lambda *args: time.sleep(600)
train.command()
"""


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    """SIGKILL at random moments; the repeated version is in make soak."""
    kills, chance = int(os.environ.get("SELFNPO_KILLS", "1")), random.Random(0)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    flags = [*RUN, "--max_train_steps", str(60 * kills)]
    assert call("train", *flags, "--output_dir", straight) == 0
    flags += ["--output_dir", str(broken)]
    for _ in range(kills):
        before = list_checkpoints(broken)
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while list_checkpoints(broken) in ([], before):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.communicate()
        flags += ["--resume_from_checkpoint", "latest"]
    assert call("train", *flags) == 0
    one, other = (load_file(folder / "negative" / WEIGHTS) for folder in (straight, broken))
    assert all(one[name].equal(other[name]) for name in one)
    assert not [path for path in broken.iterdir() if path.name.startswith(".")]  # no partial file survives
