"""Where training samples come from: counts, order of times, and equality with plain trajectories."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mixture import exact_model
from selfnpo.config import TrainConfig
from selfnpo.randomness import Site, draw_index
from selfnpo.schedule import make_grid, step_rows
from selfnpo.training.rollout import DataRollout, NoiseRollout, Reference, TrajectoryPool, make_rollout
from selfnpo_kernels import forward_jump, guided_step

BATCH, SEED, N = 6, 3, 4


class Counting(nn.Module):
    """A denoiser that counts the samples it is asked about."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.rows = denoiser, 0

    def forward(self, sample, *args, **kwargs):
        self.rows += len(sample)
        return self.denoiser(sample, *args, **kwargs)


@pytest.fixture
def model():
    return exact_model()


def reference(model, guidance_scale=0.0, steps=N):
    return Reference(model, make_grid(model.scheduler, steps), guidance_scale)


def drawn(pool, denoiser, step):
    """A batch of a pool that the reference has evaluated and moved on."""
    if step == 0:
        pool.fill(denoiser)
    batch = pool.draw(denoiser, torch.tensor(step))
    prev_sample, target = pool.reference.step(denoiser, batch.sample, batch.position, batch.condition)
    pool.advance(batch, prev_sample)
    return replace(batch, target=target)


def start_noise(ids, step=0):
    return forward_jump(
        torch.zeros(len(ids), 2), torch.tensor([[0.0, 1.0]]).repeat(len(ids), 1), SEED, step, ids, Site.START_NOISE
    )


@torch.no_grad()
def plain_trajectory(model, noise, steps=N):
    """States x at positions 0..N-1 and the estimates there, by an ordinary sampling loop."""
    grid, states, estimates = make_grid(model.scheduler, steps), [], []
    sample = noise
    for timestep, row in zip(grid.timesteps, step_rows(grid), strict=True):
        states.append(sample)
        output = model.predict(
            model.denoiser, sample, timestep.expand(len(sample)), torch.ones(len(sample), dtype=torch.int64)
        )
        sample, estimate = guided_step(sample, output, None, 1.0, row.expand(len(sample), -1))
        estimates.append(estimate)
    return states, estimates


@torch.no_grad()
@pytest.mark.parametrize("pool_size", [1, 3])
def test_a_pool_walks_plain_trajectories_batch_by_batch(model, pool_size):
    pool = TrajectoryPool(reference(model), BATCH, SEED, pool_size)
    for step in range(2 * N * pool_size):
        batch = drawn(pool, model.denoiser, step)
        turn, index = divmod(step, pool_size)
        for member in range(BATCH):
            slot, position = int(pool.slots[index, member]), int(batch.position[member])
            generation, expected = divmod(int(pool.first_position[index, member]) + turn, N)
            assert position == expected
            ids = torch.tensor([generation * BATCH * pool_size + slot])
            states, estimates = plain_trajectory(model, start_noise(ids))
            torch.testing.assert_close(batch.sample[member : member + 1], states[position], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(batch.target[member : member + 1], estimates[position], rtol=1e-5, atol=1e-5)
        counts = batch.position.bincount(minlength=N)
        assert counts.max() - counts.min() <= 1  # every batch holds every time, as evenly as its size allows
    assert pool.slots.flatten().sort().values.equal(torch.arange(BATCH * pool_size))


@torch.no_grad()
@pytest.mark.parametrize(("guidance_scale", "rows"), [(0.0, 1), (1.0, 1), (2.0, 2)])
def test_a_pool_costs_one_evaluation_per_sample(model, guidance_scale, rows):
    counting = Counting(model.denoiser)
    pool = TrajectoryPool(reference(model, guidance_scale), BATCH, SEED, pool_size=2)
    filled = pool.fill(counting)
    assert filled == 2 * BATCH * (N + 1) // 2
    assert counting.rows == rows * filled
    for step in range(1, 10):
        counting.rows = 0
        assert drawn(pool, counting, step).evaluations == BATCH
        assert counting.rows == rows * BATCH


@torch.no_grad()
def test_fresh_rollouts_stop_everywhere_and_evaluate_nothing_after(model):
    counting = Counting(model.denoiser)
    batch = NoiseRollout(reference(model), 4000, SEED, full=False).draw(counting, torch.tensor(0))
    counts = batch.position.bincount(minlength=N)
    assert (counts - 1000).abs().max() < 5 * 750**0.5
    assert batch.evaluations == counting.rows == int((batch.position + 1).sum())
    assert batch.position.equal(draw_index(0, N, SEED, 0, Site.STOP, torch.arange(4000)))
    states, estimates = plain_trajectory(model, start_noise(torch.arange(4000)))
    for position in range(N):
        here = batch.position == position
        torch.testing.assert_close(batch.sample[here], states[position][here], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch.target[here], estimates[position][here], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_full_rollouts_reach_the_clean_end(model):
    counting = Counting(model.denoiser)
    batch = NoiseRollout(reference(model), BATCH, SEED, full=True).draw(counting, torch.tensor(0))
    _, estimates = plain_trajectory(model, start_noise(torch.arange(BATCH)))
    torch.testing.assert_close(batch.target, estimates[-1])
    assert batch.sample.equal(batch.target)
    assert batch.position.tolist() == [N] * BATCH
    assert counting.rows == batch.evaluations == N * BATCH


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2])
def test_data_rollouts_take_k_steps_and_no_more(model, k):
    counting = Counting(model.denoiser)
    images, conditions = torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    grid = make_grid(model.scheduler, N)
    batch = DataRollout(reference(model), 400, SEED, grid, images, conditions, k).draw(counting, torch.tensor(0))
    start = draw_index(0, N, SEED, 0, Site.START, torch.arange(400))
    assert batch.position.equal((start + k).clamp(max=N - 1))
    assert batch.evaluations == counting.rows == int(((start + k).clamp(max=N - 1) - start + 1).sum())
    assert batch.evaluations < (k + 1) * 400  # a finished sample is not evaluated again


def test_guidance_combines_both_branches(demo):
    sample = torch.randn(3, 1, 8, 8)
    condition, timesteps = torch.tensor([1, 2, 3]), torch.tensor([500.0, 300.0, 100.0])
    null = torch.full_like(condition, demo.null_condition)
    cond, uncond = demo.predict_guided(demo.denoiser, sample, timesteps, condition, 2.0)
    torch.testing.assert_close(cond, demo.predict(demo.denoiser, sample, timesteps, condition))
    torch.testing.assert_close(uncond, demo.predict(demo.denoiser, sample, timesteps, null))
    alone, nothing = demo.predict_guided(demo.denoiser, sample, timesteps, condition, 0)
    assert nothing is None
    torch.testing.assert_close(alone, uncond)


@pytest.mark.parametrize("mode", ["pool", "fresh", "full", "data"])
def test_every_mode_is_a_function_of_seed_and_step(demo, mode):
    def draw(seed, step):
        config = TrainConfig(rollout=mode, train_batch_size=8, seed=seed, num_inference_steps=5, num_rollout_steps=2)
        with torch.no_grad():
            rollout = make_rollout(config, demo, make_grid(demo.scheduler, 5))
            rollout.fill(demo.denoiser)
            return rollout.draw(demo.denoiser, torch.tensor(step)).sample

    assert draw(1, 0).equal(draw(1, 0))
    assert not draw(1, 0).equal(draw(2, 0))
