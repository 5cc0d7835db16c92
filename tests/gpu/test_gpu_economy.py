"""A step leaves nothing behind on the GPU, and never waits for it."""

import gc

import pytest
import torch

from no_waiting import no_waiting
from runs import RANKS

pytestmark = pytest.mark.gpu

CAPTURE = pytest.mark.parametrize("capture", ["off", "on"])


def test_waiting_is_noticed():
    one = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        one.item()


@CAPTURE
@pytest.mark.parametrize(("rank", "tandem"), [(0, "sequential"), (2, "sequential"), (2, "shared")])
@pytest.mark.parametrize("model", ["demo", "stable_diffusion"])
def test_a_step_waits_for_nothing(trained, model, rank, tandem, capture):
    trainer, _ = trained(8, model, rank=rank, tandem=tandem, capture=capture, mixed_precision="bf16")
    with no_waiting():
        steps = [trainer.train_step() for _ in range(3)]
    assert all(value.isfinite() for step in steps for value in step)


@CAPTURE
@pytest.mark.parametrize("rank", RANKS)
def test_two_hundred_steps_keep_no_memory(trained, rank, capture):
    trainer, _ = trained(20, "demo", rank=rank, capture=capture)

    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = allocated()
    for _ in range(200):
        trainer.train_step()
    assert allocated() <= before
