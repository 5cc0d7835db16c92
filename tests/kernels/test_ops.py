"""Every op on every compiled backend against its float64 specification."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import selfnpo_kernels
from cases import DTYPES, OPERANDS, OPS, SHAPES, assert_accurate, channels_last, check, in_double, inputs
from selfnpo_kernels import backend, cfg_combine, forward_jump, guided_step, reference, tweedie, x0_loss

NO_GRADIENTS = [op for op in OPS if not op.startswith("gradient")]
EVERYWHERE = pytest.mark.parametrize("place", ["cpp", "triton", "reference"], indirect=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_equals_the_float64_reference(op, shape, dtype, place):
    check(op, inputs(shape, dtype, place.device), place.rounds_down)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) in (4, 5)])
@pytest.mark.parametrize("op", OPS)
def test_channels_last_changes_where_a_result_lies_and_not_what_it_is(op, shape, dtype, place):
    results = check(op, inputs(shape, dtype, place.device, channels_last), place.rounds_down)
    row_major = OPS[op](selfnpo_kernels, inputs(shape, dtype, place.device))
    for result, expected in zip(results, row_major, strict=True):
        if result.numel() > 1:
            assert result.stride() == channels_last(expected).stride()
            if "rescaled" not in op:  # whose sums run in memory order
                assert result.equal(expected)


@pytest.mark.parametrize("op", OPS)
def test_operands_of_mixed_layouts_and_dtypes(op, place):
    t = inputs((3, 4, 6, 5), device=place.device)
    t.cond, t.target = channels_last(t.cond), t.target.transpose(1, 3).contiguous().transpose(1, 3)
    t.uncond = t.uncond.bfloat16()
    t.rows = t.rows.double().T.contiguous().T
    check(op, t, place.rounds_down)


@pytest.mark.parametrize("op", NO_GRADIENTS)
def test_expanded_and_sliced_operands(op, place):
    t = inputs((4, 4, 6, 6), device=place.device)
    t.sample, t.rows = t.sample[:1].expand(4, -1, -1, -1), t.rows[2:3].expand(4, -1)
    t.cond = torch.cat((t.cond, t.cond), dim=-1)[..., 1:12:2]
    check(op, t, place.rounds_down)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_no_view_of_any_shape_harms_native_code(data, shape):
    def view(tensor):
        order = data.draw(st.permutations(range(tensor.ndim)))
        step = data.draw(st.integers(1, 2))
        wide = tensor.repeat_interleave(step, dim=-1)
        inverse = sorted(range(tensor.ndim), key=order.__getitem__)
        return wide.permute(order).contiguous().permute(inverse)[..., ::step]

    t = inputs(shape)
    for name in ("sample", "cond", "uncond", "target"):
        setattr(t, name, view(getattr(t, name)))
    for op in OPS:
        with backend("cpp"):
            results = OPS[op](selfnpo_kernels, t)
        for result, expected in zip(results, OPS[op](reference, t), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_large_and_threaded_gives_the_same_bits():
    t = inputs((3, 4, 111, 97))
    for op in OPS:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OPS[op](selfnpo_kernels, t))
        for one, *others in zip(*results, strict=True):
            assert all(one.equal(other) for other in others), op


@EVERYWHERE
def test_a_guidance_scale_of_one_is_the_conditional_branch(place):
    """u + (c - u) rounds once, so identity holds to that rounding; without uncond it is exact."""
    t = inputs((3, 500), device=place.device)
    rows = torch.tensor([[0.0, 1.0, 0.0, 1.0]], device=place.device).expand(3, 4)
    for guided in guided_step(t.sample, t.cond, t.uncond, 1.0, rows):
        torch.testing.assert_close(guided, t.cond, rtol=0, atol=5e-7)
    for plain in guided_step(t.sample, t.cond, None, 1.0, rows):
        assert plain.equal(t.cond)
    torch.testing.assert_close(cfg_combine(torch.cat((t.uncond, t.cond)), 1.0), t.cond, rtol=0, atol=5e-7)


@EVERYWHERE
def test_a_zero_coefficient_removes_even_infinities(place):
    t, infinite = inputs((3, 70), device=place.device), torch.full((3, 70), float("inf"), device=place.device)
    finished = torch.tensor([[1.0, 0.0, 1.0, 0.0]], device=place.device).expand(3, 4)
    assert tweedie(t.sample, infinite, finished[:, :2]).equal(t.sample)
    for untouched in guided_step(t.sample, infinite, None, 1.0, finished):
        assert untouched.equal(t.sample)
    assert forward_jump(t.sample, finished[:, :2], 0, 0, t.ids).equal(t.sample)
    noise = forward_jump(infinite, finished[:, 1:3].contiguous(), 0, 0, t.ids)
    assert noise.isfinite().all()
    model_output = infinite.requires_grad_()
    loss = x0_loss(model_output, t.sample, t.sample, torch.tensor([[1.0, 0.0, 1.0]], device=place.device).expand(3, 3))
    loss.backward()
    assert loss == 0
    assert (model_output.grad == 0).all()


def test_nothing_at_all_is_a_row_of_zeros(place):
    t = inputs((2, 9), device=place.device)
    assert (forward_jump(t.sample, torch.zeros(2, 2, device=place.device), 0, 0, t.ids) == 0).all()


def test_the_loss_is_the_same_every_time(place):
    t = inputs((3, 4, 33, 31), device=place.device)
    assert x0_loss(t.cond, t.sample, t.target, t.rows[:, :3]) == x0_loss(t.cond, t.sample, t.target, t.rows[:, :3])


def test_huber_loss_keeps_small_differences(place):
    """sqrt(d^2 + c^2) - c in float32 would lose them all."""
    target = torch.zeros(1, 64, device=place.device)
    rows = torch.tensor([[0.0, 1.0, 1.0]], device=place.device)
    loss = x0_loss(target + 1e-6, target, target, rows, "huber", 1.0)
    torch.testing.assert_close(loss.item(), 0.5e-12, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_rescaling_far_from_zero(rescale, place):
    """A mean of 100 standard deviations does not swallow the variance."""
    t = inputs((2, 4, 40, 40), device=place.device)
    batched = t.batched[:4] + 100
    exact = reference.cfg_combine(batched.double(), 3.0, rescale)
    torch.testing.assert_close(cfg_combine(batched, 3.0, rescale).double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("op", NO_GRADIENTS)
def test_gradients_in_double_precision(op):
    t = in_double(inputs((2, 3, 2)))

    def call(*operands):
        return tuple(OPS[op](selfnpo_kernels, SimpleNamespace(**(vars(t) | dict(zip(OPERANDS, operands, strict=True))))))

    assert torch.autograd.gradcheck(call, [getattr(t, operand).requires_grad_() for operand in OPERANDS])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("x0_loss", "gradient"))])
def test_gradients_of_compiled_backends(op, dtype, place):
    """Of the linear ops, in the operands' dtypes; those of the loss are ops themselves."""

    def gradients(lib, t):
        leaves = [tensor.requires_grad_() for tensor in (t.sample, t.cond, t.uncond, t.batched)]
        outputs = OPS[op](lib, t)
        torch.autograd.backward(outputs, [t.target[: len(out)].to(out) for out in outputs])
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    t = inputs((3, 4, 5, 6), dtype, place.device)
    exact = gradients(reference, in_double(t))
    eager = gradients(reference, inputs((3, 4, 5, 6), dtype, place.device))
    for triple in zip(gradients(selfnpo_kernels, t), eager, exact, strict=True):
        assert_accurate(*triple)
