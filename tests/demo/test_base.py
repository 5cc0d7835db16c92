"""The demo's base model: its command makes the weights that the package ships."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from selfnpo.demo.base import BaseConfig, train_base
from selfnpo.models import DEMO_FOLDER


def weights(model: DiTTransformer2DModel) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_equal_seeds_give_equal_bits():
    before = torch.get_rng_state()
    once, again, other = (weights(train_base("final", 3, seed)) for seed in (0, 0, 1))
    assert once.equal(again)
    assert not once.equal(other)
    assert torch.get_rng_state().equal(before)


@pytest.mark.slow
def test_the_whole_training_gives_the_shipped_weights():
    """Not the same bits: another CPU or torch rounds otherwise, which 3,000 steps made 2e-4 of the weights' norm."""
    shipped = weights(DiTTransformer2DModel.from_pretrained(DEMO_FOLDER / "transformer"))
    made = weights(train_base("final", BaseConfig.max_train_steps, BaseConfig.seed))
    assert (made - shipped).norm() < 1e-3 * shipped.norm()
