"""The share of the student's conditions that becomes the null condition."""

import pytest
import torch

from selfnpo.config import TrainConfig
from selfnpo.training.rollout import RolloutBatch
from selfnpo.training.trainer import Trainer

COUNT = 20_000
STEP = torch.tensor(7)


@pytest.fixture
def objective(demo):
    def with_dropout(share):
        return Trainer(TrainConfig(condition_dropout=share, train_batch_size=1, pool_size=1), demo).step.objective

    return with_dropout


@pytest.fixture
def batch(demo):
    condition = torch.arange(COUNT) % demo.num_conditions
    return RolloutBatch(torch.zeros(COUNT, *demo.sample_shape), None, torch.ones_like(condition), condition, COUNT)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_becomes_the_null_condition_and_the_others_stay(demo, objective, batch, share):
    asked = objective(share).jump(batch, STEP).condition
    is_dropped = asked == demo.null_condition
    error = (share * (1 - share) / COUNT) ** 0.5
    assert is_dropped.double().mean().item() == pytest.approx(share, abs=4 * error)
    assert asked[~is_dropped].equal(batch.condition[~is_dropped])
    by_condition = is_dropped.view(-1, demo.num_conditions).double().mean(0)  # none is dropped more often than the others
    assert (by_condition - share).abs().max() < 4 * error * demo.num_conditions**0.5


def test_all_or_nothing_is_exact(demo, objective, batch):
    assert objective(0.0).jump(batch, STEP).condition.equal(batch.condition)
    assert (objective(1.0).jump(batch, STEP).condition == demo.null_condition).all()


def test_other_steps_drop_others(demo, objective, batch):
    one, other = (objective(0.5).jump(batch, step).condition == demo.null_condition for step in (STEP, STEP + 1))
    assert (one == other).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_micro_batches_drop_the_same(objective, batch):
    dropping = objective(0.5)
    parts = [dropping.jump(part, STEP).condition for part in batch.split(COUNT // 3)]
    assert torch.cat(parts).equal(dropping.jump(batch, STEP).condition)
