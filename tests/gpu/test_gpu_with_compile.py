"""--compile on a GPU, where only the blocks that repeat are compiled: the losses of eager PyTorch, captured or not."""

import pytest
import torch

from models.runs import RANKS

pytestmark = pytest.mark.gpu

STEPS = 10


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("rank", RANKS)
def test_compiled_steps_are_the_eager_ones(trained, capsys, rank, capture):
    torch._dynamo.reset()
    _, expected = trained(STEPS, "demo", capture="off", rank=rank)
    assert "compiled in" not in capsys.readouterr().out
    _, losses = trained(STEPS, "demo", capture=capture, rank=rank, compile=True)
    assert "compiled in" in capsys.readouterr().out
    assert losses == pytest.approx(expected, rel=1e-3)
