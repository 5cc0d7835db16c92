"""Coefficient rows against diffusers' own schedulers."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from selfnpo.errors import UserError
from selfnpo.schedule import jump_rows, loss_rows, make_grid, make_schedule, step_rows
from selfnpo_kernels import guided_step, x0_loss

BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = [(betas, kind) for betas in BETAS for kind in PREDICTIONS if (betas, kind) != ("zero_snr", "epsilon")]


def output_for(prediction_type, sample, timestep):
    """A stand-in for a model: smooth, bounded, and different at every time."""
    wave = torch.tanh(sample * 0.7 + float(timestep) / 1000)
    return 0.8 * wave if prediction_type == "sample" else wave


def trajectory(scheduler, steps, prediction_type):
    grid = make_grid(scheduler, steps)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = []
    for timestep, row in zip(grid.timesteps, step_rows(grid), strict=True):
        output = output_for(prediction_type, sample, timestep)
        sample, x0 = guided_step(sample, output, None, 1.0, row.expand(2, 4))
        states.append((sample, x0))
    return states


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(("betas", "prediction_type"), SCHEDULES)
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_trajectories_equal_diffusers(betas, prediction_type, spacing, steps):
    scheduler = DDIMScheduler(
        **BETAS[betas],
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        clip_sample=False,
        steps_offset=spacing == "leading",
    )
    ours = trajectory(scheduler, steps, prediction_type)
    scheduler.set_timesteps(steps)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep, (prev, x0) in zip(scheduler.timesteps, ours, strict=True):
        theirs = scheduler.step(output_for(prediction_type, sample, timestep), timestep, sample)
        sample = theirs.prev_sample
        scale = max(1.0, sample.abs().max().item())
        assert (prev - sample).abs().max() <= 1e-5 * scale
        scale = max(1.0, theirs.pred_original_sample.abs().max().item())
        assert (x0 - theirs.pred_original_sample).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_trajectories_equal_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = trajectory(scheduler, 20, "flow")
    scheduler.set_timesteps(20)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep, (prev, _) in zip(scheduler.timesteps, ours, strict=True):
        sample = scheduler.step(output_for("flow", sample, timestep), timestep, sample).prev_sample
        assert (prev - sample).abs().max() <= 1e-5


def test_cogvideox_keeps_its_snr_shift_and_other_samplers_are_read_as_ddim():
    cog = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0)
    torch.testing.assert_close(make_schedule(cog).alpha ** 2, cog.alphas_cumprod.double())
    pndm = PNDMScheduler(**BETAS["scaled_linear"], steps_offset=1, skip_prk_steps=True)  # what Stable Diffusion 1.5 ships
    assert make_grid(pndm, 25).timesteps[[0, -1]].tolist() == [961, 1]


@pytest.mark.parametrize(("betas", "prediction_type"), SCHEDULES)
def test_rows_invert_the_definition_of_the_prediction(betas, prediction_type):
    schedule = make_schedule(DDIMScheduler(**BETAS[betas], prediction_type=prediction_type))
    x0, eps = torch.randn(2, 1000, dtype=torch.float64)
    sample = schedule.alpha * x0 + schedule.sigma * eps
    output = {"epsilon": eps, "v_prediction": schedule.alpha * eps - schedule.sigma * x0, "sample": x0}[prediction_type]
    p, q, k = loss_rows(schedule, "x0").double().unbind(1)
    assert (k == 1).all()
    assert ((p * sample + q * output - x0).abs() <= 1e-6 / schedule.alpha.clamp(min=1e-6).clamp(max=1)).all()


@pytest.mark.parametrize(("betas", "prediction_type"), SCHEDULES)
def test_epsilon_weighting_is_the_epsilon_loss_and_stays_finite(betas, prediction_type):
    schedule = make_schedule(DDIMScheduler(**BETAS[betas], prediction_type=prediction_type))
    rows = loss_rows(schedule, "epsilon")
    assert rows.isfinite().all()
    x0, eps, wrong = torch.randn(3, 1000, 1, dtype=torch.float64)
    alpha, sigma = schedule.alpha[:, None], schedule.sigma[:, None]
    output = {"epsilon": eps + wrong, "v_prediction": alpha * eps - sigma * x0 + wrong, "sample": x0 + wrong}[
        prediction_type
    ]
    in_epsilon = {"epsilon": wrong, "v_prediction": alpha * wrong, "sample": alpha / sigma * wrong}[prediction_type]
    loss = x0_loss(output, alpha * x0 + sigma * eps, x0, rows.double())
    torch.testing.assert_close(loss, in_epsilon.square().mean(), rtol=1e-4, atol=0)


def test_jumps_compose_and_are_exact_near_t():
    schedule = make_schedule(DDIMScheduler(**BETAS["scaled_linear"]))
    rows, first = jump_rows(schedule, schedule.alpha, schedule.sigma)
    rows = rows.double()
    assert first.tolist() == list(range(1, 1001))
    t, u, s = 100, 101, 700
    (a1, b1), (a2, b2), (a, b) = rows[t, u], rows[u, s], rows[t, s]
    torch.testing.assert_close(a2 * a1, a, rtol=1e-6, atol=0)
    torch.testing.assert_close(a2**2 * b1**2 + b2**2, b**2, rtol=1e-6, atol=0)
    assert all(rows[t, t + 1, 1] > 0 for t in range(999))  # in bfloat16 arithmetic a quarter of these are not positive
    exact = schedule.sigma[1:] ** 2 - (schedule.alpha[1:] / schedule.alpha[:-1] * schedule.sigma[:-1]) ** 2
    torch.testing.assert_close(torch.stack([rows[t, t + 1, 1] for t in range(999)]) ** 2, exact, rtol=1e-6, atol=0)


def test_the_noisiest_time_has_no_later_one_and_zero_snr_forgets_the_sample():
    schedule = make_schedule(DDIMScheduler(**BETAS["zero_snr"], prediction_type="v_prediction"))
    rows, first = jump_rows(schedule, schedule.alpha[-2:], schedule.sigma[-2:])
    assert first.tolist() == [999, 1000]
    assert rows[0, 999].tolist() == [0.0, 1.0]
    assert rows[1].isfinite().all()


@pytest.mark.parametrize("steps", [0, -3, 30, 1001])
def test_a_grid_that_does_not_divide_is_refused(steps):
    with pytest.raises(UserError, match=rf"num_inference_steps is {steps}; expected a divisor of the 1000.*25"):
        make_grid(DDIMScheduler(), steps)


def test_epsilon_at_zero_terminal_snr_is_refused():
    with pytest.raises(UserError, match="zero terminal SNR; use v_prediction"):
        make_schedule(DDIMScheduler(**BETAS["zero_snr"], prediction_type="epsilon"))


def test_dynamic_shifting_is_refused():
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        make_schedule(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
