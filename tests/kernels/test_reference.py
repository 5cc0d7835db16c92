"""Properties of the specification."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from selfnpo_kernels import cfg_combine, guided_step, tweedie, x0_loss

SHAPES = [(3, 4, 5, 6), (2, 4, 3, 5, 6), (4, 7), (0, 4, 8, 8)]


def draw(shape, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_tweedie_and_guided_step_are_affine_per_sample(shape):
    sample, cond, uncond = draw(shape, 3)
    rows = torch.randn(shape[0], 4, dtype=torch.float64)
    prev, x0 = guided_step(sample, cond, uncond, 2.5, rows)
    for i in range(shape[0]):
        output = uncond[i] + 2.5 * (cond[i] - uncond[i])
        torch.testing.assert_close(x0[i], rows[i, 0] * sample[i] + rows[i, 1] * output)
        torch.testing.assert_close(prev[i], rows[i, 2] * sample[i] + rows[i, 3] * output)
    torch.testing.assert_close(tweedie(sample, uncond + 2.5 * (cond - uncond), rows[:, :2]), x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32_and_returned_as_it_came(dtype):
    sample, output = (tensor.to(dtype) for tensor in draw((2, 64), 2))
    rows = torch.tensor([[214.3, -213.9]]).repeat(2, 1)  # Stable Diffusion's noisiest time: large terms that nearly cancel
    result = tweedie(sample, output, rows)
    exact = tweedie(sample.double(), output.double(), rows)
    assert result.dtype == dtype
    assert (result.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_cfg_combine_is_diffusers_guidance(rescale):
    (output,) = draw((6, 4, 8, 8), 1)
    negative, positive = output.chunk(2)
    expected = negative + 5.0 * (positive - negative)
    if rescale:
        expected = rescale_noise_cfg(expected, positive, guidance_rescale=rescale)
    torch.testing.assert_close(cfg_combine(output, 5.0, rescale), expected)
    w = 4.0  # the paper writes (w + 1) positive - w negative
    torch.testing.assert_close(cfg_combine(output, w + 1), (w + 1) * positive - w * negative)


def test_losses():
    output, sample, target = draw((3, 4, 2), 3)
    rows = torch.randn(3, 3, dtype=torch.float64)
    p, q, k = (column[:, None, None] for column in rows.unbind(1))
    difference = p * sample + q * output - k * target
    torch.testing.assert_close(x0_loss(output, sample, target, rows), difference.square().mean())
    huber = (torch.sqrt(difference.square() + 0.1**2) - 0.1).mean()
    torch.testing.assert_close(x0_loss(output, sample, target, rows, "huber", 0.1), huber)
