"""Checkpoints of a run on a GPU: copied between two steps, written beside those that follow."""

import time
from dataclasses import replace

import pytest
import torch

from no_waiting import no_waiting
from runs import RANKS, assert_same_state, start
from selfnpo.output import list_checkpoints
from selfnpo.training import snapshot
from selfnpo.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("rank", RANKS)
def test_a_checkpoint_is_of_its_step_and_resumes_exactly(begin, tmp_path, monkeypatch, rank, capture):
    """While a slow disk writes, steps go on, and one of them is captured."""
    save = snapshot.save_checkpoint
    monkeypatch.setattr(snapshot, "save_checkpoint", lambda *args: (time.sleep(0.5), save(*args)))
    straight = begin("demo", rank=rank, capture=capture, max_train_steps=12, checkpointing_steps=4)
    straight = start(straight.config, tmp_path / "run")
    states = {}
    for step in range(1, 9):
        straight.train_step()
        if step in (4, 8):
            states[step] = {name: tensor.clone() for name, tensor in straight.state.tensors().items()}
            straight._checkpoint()
    straight.writer.wait()
    for step, expected in states.items():
        tensors, scalars = load_checkpoint(tmp_path / "run" / f"checkpoint-{step}")
        assert scalars["step"] == step
        assert all(tensors[name].equal(tensor.cpu()) for name, tensor in expected.items())
    straight.run()
    (tmp_path / "run" / "checkpoint-12" / "state.json").unlink()
    resumed = start(replace(straight.config, resume_from_checkpoint="latest"), tmp_path / "run")
    assert resumed.state.step == 8
    resumed.run()
    assert_same_state(straight, resumed)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-8", "checkpoint-12"]


def test_a_checkpoint_waits_for_nothing(begin, tmp_path):
    trainer = start(begin("demo", capture="off").config, tmp_path / "run")
    for _ in range(2):  # the second time the buffers are there
        trainer.train_step()
        trainer._checkpoint()
        trainer.writer.wait()
    trainer.train_step()
    with no_waiting():
        trainer._checkpoint()
    trainer.writer.wait()
    assert load_checkpoint(tmp_path / "run" / "checkpoint-3")[1]["step"] == 3


def test_the_base_lies_in_pinned_memory_and_the_host_waits_once(begin, monkeypatch):
    trainer = begin("demo", capture="off")
    assert all(parameter.is_pinned() for parameter in trainer.base.denoiser.parameters())
    trainer.train_step()
    trainer.state.relative_delta()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "item", lambda tensor: tensor)
        with no_waiting():
            trainer.state.relative_delta()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert trainer.state.relative_delta() > 0
    largest = max(parameter.nbytes for parameter in trainer.base.denoiser.parameters())
    assert torch.cuda.max_memory_allocated() - before <= 8 * largest + (1 << 20)
