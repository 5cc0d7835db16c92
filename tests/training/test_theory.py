"""Theorems 1 to 3 of Self-NPO, through the project's own rollouts and objective, on a model whose answers are known.

Every test comes with the mistake that it must catch: noising the target instead of x_t.
"""

import dataclasses

import pytest
import torch
from scipy import stats

from mixture import draw_x0, exact_model
from selfnpo.schedule import jump_rows, make_grid, make_schedule
from selfnpo.training.objective import TruncatedObjective
from selfnpo.training.rollout import NoiseRollout, Reference, RolloutBatch
from selfnpo_kernels import forward_jump, philox_normal

STEPS = 200  # fine enough that the error of DDIM stays below the resolution of the tests
COUNT = 60_000


@pytest.fixture(scope="module")
def model():
    return exact_model()


@pytest.fixture(scope="module")
def rollouts(model) -> RolloutBatch:
    """x_t, reached from noise by DDIM with the exact reference at random grid times, and its Tweedie estimate."""
    rollout = NoiseRollout(Reference(model, make_grid(model.scheduler, STEPS), 0.0), COUNT, seed=11, full=False)
    with torch.no_grad():
        return rollout.draw(model.denoiser, torch.tensor(0))


def smallest_p_value(a, b):
    """Two-sample Kolmogorov-Smirnov along eight directions, corrected for their number."""
    angles = torch.arange(8) * torch.pi / 8
    directions = torch.stack((angles.cos(), angles.sin()))
    pairs = zip((a.double() @ directions.double()).T, (b.double() @ directions.double()).T, strict=True)
    return 8 * min(stats.ks_2samp(x.numpy(), y.numpy()).pvalue for x, y in pairs)


@pytest.mark.parametrize(("t", "s"), [(99, 120), (299, 350), (499, 999)])
def test_theorem_1_the_jump_has_the_marginal_of_the_noised_reference(model, t, s):
    schedule, grid = make_schedule(model.scheduler), make_grid(model.scheduler, STEPS)
    ids = torch.arange(COUNT)
    start, stop = torch.zeros_like(ids), torch.full_like(ids, grid.timesteps.tolist().index(t))
    with torch.no_grad():
        noise = philox_normal((COUNT, 2), 1, 0, 0, ids)
        batch = Reference(model, grid, 0.0).roll(model.denoiser, noise, start, stop, torch.zeros_like(ids))
    rows, _ = jump_rows(schedule, schedule.alpha[t : t + 1], schedule.sigma[t : t + 1])
    from_x_t = forward_jump(batch.sample, rows[:, s].expand(COUNT, 2), 5, 0, ids)
    clean = torch.stack((schedule.alpha[s], schedule.sigma[s])).float().expand(COUNT, 2)
    direct = forward_jump(draw_x0(COUNT, torch.Generator().manual_seed(1)).float(), clean, 6, 0, ids)
    assert smallest_p_value(from_x_t, direct) > 0.01

    if s < 999:  # pure noise hides every mistake
        from_target = forward_jump(batch.target, clean, 5, 0, ids)
        assert smallest_p_value(from_target, direct) < 1e-6


def gradients(model, batch, weighting="epsilon"):
    """Gradient of the loss with respect to `linear` in blocks of samples, `[blocks, 6]`, so that it has an error."""
    objective = TruncatedObjective(
        model,
        make_schedule(model.scheduler),
        make_grid(model.scheduler, STEPS),
        kind="l2",
        weighting=weighting,
        huber_c=1.0,
        condition_dropout=0.0,
        seed=3,
    )
    blocks = []
    for step, index in enumerate(torch.arange(len(batch.sample)).split(200)):
        part = {name: getattr(batch, name)[index] for name in ("sample", "target", "position", "condition")}
        asked = objective.jump(dataclasses.replace(batch, **part), torch.tensor(step))
        output = model.predict(model.denoiser, asked.sample, asked.timesteps, asked.condition)
        loss = objective.loss(asked, output, part["target"])
        (gradient,) = torch.autograd.grad(loss, model.denoiser.linear)
        blocks.append(gradient.flatten())
    return torch.stack(blocks)


def largest_z(difference):
    """Mean over its standard error, the largest over all parameters."""
    return (difference.mean(0) / (difference.std(0) / len(difference) ** 0.5)).abs().max().item()


@pytest.fixture(scope="module")
def paired(model) -> tuple[RolloutBatch, torch.Tensor]:
    """x_t with the x_0 that it came from, for comparing targets on the same x_s."""
    grid = make_grid(model.scheduler, STEPS)
    generator = torch.Generator().manual_seed(4)
    x0 = draw_x0(COUNT, generator)
    position = torch.randint(STEPS, (COUNT,), generator=generator)
    alpha, sigma = grid.alpha[position][:, None], grid.sigma[position][:, None]
    sample = alpha * x0 + sigma * torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)
    target = model.denoiser.posterior_mean(sample, alpha, sigma)
    return RolloutBatch(sample, target, position, torch.zeros(COUNT, dtype=torch.int64), 0), x0


@pytest.fixture
def moved(model):
    """A student away from the optimum, so that gradients do not vanish."""
    with torch.no_grad():
        model.denoiser.linear.copy_(torch.tensor([[0.1, -0.05, 0.2], [0.05, 0.1, -0.1]]))
    yield model
    with torch.no_grad():
        model.denoiser.linear.zero_()


@pytest.mark.parametrize("weighting", ["epsilon", "x0"])
def test_theorem_2_the_gradient_is_that_of_the_true_x0(moved, paired, weighting):
    batch, x0 = paired
    with_tweedie = gradients(moved, batch, weighting)
    with_x0 = gradients(moved, dataclasses.replace(batch, target=x0), weighting)
    assert largest_z(with_tweedie - with_x0) < 4
    assert largest_z(with_tweedie) > 5  # there is a gradient to compare

    mistaken = gradients(moved, dataclasses.replace(batch, target=0.9 * batch.target), weighting)
    assert largest_z(mistaken - with_x0) > 5


def test_theorem_3_the_gradient_is_that_of_standard_diffusion_training(moved, rollouts):
    """Rollouts and jumps on one side; on the other clean samples, diffused to the same distribution of s."""
    truncated = gradients(moved, rollouts)
    x0 = draw_x0(COUNT, torch.Generator().manual_seed(6))
    grid = make_grid(moved.scheduler, STEPS)
    alpha, sigma = grid.alpha[rollouts.position][:, None], grid.sigma[rollouts.position][:, None]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # Diffusing through x_t first leaves the law of x_s given x_0 as it is, and makes s follow t as it does in rollouts.
    standard = gradients(moved, dataclasses.replace(rollouts, sample=alpha * x0 + sigma * noise, target=x0))
    spread = (truncated.var(0) / len(truncated) + standard.var(0) / len(standard)).sqrt()
    assert ((truncated.mean(0) - standard.mean(0)) / spread).abs().max() < 4

    mistake = dataclasses.replace(rollouts, sample=alpha * rollouts.target + sigma * noise)  # noise on the target
    mistaken = gradients(moved, mistake)
    assert ((mistaken.mean(0) - standard.mean(0)) / spread).abs().max() > 5


def test_an_exact_reference_is_a_fixed_point(model, rollouts):
    assert largest_z(gradients(model, rollouts)) < 4
    shifted = dataclasses.replace(rollouts, target=rollouts.target + 0.05)
    assert largest_z(gradients(model, shifted)) > 5
