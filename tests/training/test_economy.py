"""What saves memory leaves the training what it was."""

import shutil
from dataclasses import replace

import pytest
import torch

from runs import RANKS, assert_same_state, settings, start
from selfnpo.device import dtype_of
from selfnpo.training.optimizer import moment_bytes


@pytest.mark.parametrize("rank", RANKS)
def test_gradient_checkpointing_and_low_vram_change_nothing(models, rank):
    config = settings(models("stable_diffusion"), rank=rank)
    runs = [start(config), start(replace(config, gradient_checkpointing=True)), start(replace(config, low_vram=True))]
    for _ in range(3):
        losses = [run.train_step()[0].item() for run in runs]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert [run.state.base.denoiser.is_gradient_checkpointing for run in runs] == [False, rank > 0, rank > 0]


@pytest.mark.parametrize("rollout", ["pool", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fresh", "full"))])
def test_accumulated_gradients_are_those_of_the_whole_batch(models, rollout):
    config = settings(models("stable_diffusion"), rollout=rollout, rollout_guidance_scale=2.0, train_batch_size=4)
    whole, parts = start(config), start(replace(config, train_batch_size=1, gradient_accumulation_steps=4))
    for _ in range(3):
        assert parts.train_step()[0].item() == pytest.approx(whole.train_step()[0].item(), rel=1e-4)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_near_float32(models, precision, rank):
    config = settings(models("stable_diffusion"), rank=rank, reference_decay=1.0)
    exact, rough = start(config), start(replace(config, mixed_precision=precision))
    for _ in range(3):
        assert rough.train_step()[0].item() == pytest.approx(exact.train_step()[0].item(), rel=0.1)
    state = rough.state
    held = torch.bfloat16 if precision == "bf16" else torch.float32  # bfloat16 is the high half
    assert all(parameter.dtype == held for parameter in state.student.trainable.values())
    assert bool(state.student.low_halves) == (precision == "bf16")
    assert all(weight.dtype == torch.float32 for weight in state.student.masters().values())
    reference = state.base.denoiser if rank else state.student.reference
    assert next(reference.parameters()).dtype == dtype_of(precision)
    assert state.scaler.is_enabled() == (precision == "fp16")
    assert state.relative_delta() == pytest.approx(exact.state.relative_delta(), rel=0.2)


def test_moments_in_8_bits(models, tmp_path):
    config = settings(models("stable_diffusion"))
    exact, rough = start(config), start(replace(config, use_8bit_adam=True), tmp_path)
    rough.run()
    while exact.state.step < 4:
        exact.train_step()
    assert rough.state.relative_delta() == pytest.approx(exact.state.relative_delta(), rel=0.1)
    names = ("state1", "state2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq")
    for trainer in (exact, rough):
        moments = [tensor for name, tensor in trainer.state.tensors().items() if name.endswith(names)]
        counted = sum(moment_bytes(trainer.config, parameter) for parameter in trainer.state.student.trainable.values())
        assert sum(tensor.nbytes for tensor in moments) == counted
    assert counted < 4 * sum(
        parameter.numel() for parameter in rough.state.student.trainable.values()
    )  # many are small ones here

    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = start(replace(rough.config, resume_from_checkpoint="latest"), tmp_path)
    assert resumed.state.step == 2
    resumed.run()
    assert_same_state(rough, resumed)


def test_an_overflow_in_float16_leaves_the_step_out(models, tmp_path):
    trainer = start(settings(models("stable_diffusion"), rank=2, mixed_precision="fp16"), tmp_path)
    trainer.state.scaler = trainer.state.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.detach().clone() for parameter in trainer.state.student.trainable.values()]
    loss, norm = trainer.train_step()
    assert loss.isfinite()
    assert not norm.isfinite()
    assert all(old.equal(new) for old, new in zip(before, trainer.state.student.trainable.values(), strict=True))
    assert trainer._log_row([loss], norm, started=0.0)["grad_norm"] is None
    trainer._checkpoint()
    trainer.writer.wait()
    resumed = start(replace(trainer.config, resume_from_checkpoint="latest"), tmp_path)
    assert resumed.state.scaler.get_scale() == 2.0**39
