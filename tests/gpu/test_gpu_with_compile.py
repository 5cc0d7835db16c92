"""--compile on a GPU, where only the blocks that repeat are compiled: the losses of eager PyTorch, captured or not."""

import pytest
import torch

from runs import RANKS

pytestmark = pytest.mark.gpu

STEPS = 10


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("model", "precision", "share"), [("demo", "no", 1e-3), ("stable_diffusion", "bf16", 2e-2)])
def test_compiled_steps_are_the_eager_ones(trained, capsys, model, precision, share, rank, capture):
    torch._dynamo.reset()
    changes = {"rank": rank, "mixed_precision": precision}
    _, expected = trained(STEPS, model, capture="off", **changes)
    assert "compiled in" not in capsys.readouterr().out
    _, losses = trained(STEPS, model, capture=capture, compile=True, **changes)
    assert "compiled in" in capsys.readouterr().out
    assert losses == pytest.approx(expected, rel=share)
