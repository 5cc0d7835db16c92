"""The compiled kernel against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import extension, forward_jump, reference

SHAPES = [(5, 3, 7), (128, 1, 8, 8), (3, 4, 64, 64), (2, 4, 3, 9, 5), (1, 1), (7,), (0, 4, 8, 8), (3, 0)]


def arguments(shape, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator),
        torch.rand(shape[0], 2, generator=generator),
        2**63 + 5,
        7,
        torch.arange(shape[0]) * 77,
        3,
    )


def test_the_extension_was_built():
    assert extension._C is not None, extension.describe()


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_float64_reference(shape):
    sample, rows, *rest = arguments(shape)
    result = forward_jump(sample, rows, *rest)
    exact = reference.forward_jump(sample.double(), rows, *rest)
    eager = reference.forward_jump(sample, rows, *rest)
    assert result.shape == sample.shape
    if result.numel():
        # At most twice the error of the same computation in eager float32.
        assert (result - exact).abs().max() <= max(2 * (eager - exact).abs().max(), 1e-7)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1)
)
def test_any_shape_seed_and_step(shape, seed, step):
    sample, rows = torch.randn(shape), torch.rand(shape[0], 2)
    ids = torch.arange(shape[0]) * 1_000_003 + step
    result = forward_jump(sample, rows, seed, step, ids, 1)
    torch.testing.assert_close(result, reference.forward_jump(sample, rows, seed, step, ids, 1), rtol=1e-6, atol=2e-6)


def test_large_and_threaded_draws_the_same_noise():
    """Enough counters for several threads, with a tail in every sample."""
    sample, rows, *rest = arguments((9, 5, 999))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(forward_jump(sample, rows, *rest))
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])
    assert (results[0] - reference.forward_jump(sample, rows, *rest)).abs().max() < 2e-6


def test_a_sample_jumps_alone_as_it_does_in_a_batch():
    sample, rows, seed, step, ids, site = arguments((6, 4, 5))
    together = forward_jump(sample, rows, seed, step, ids, site)
    assert together[4:5].equal(forward_jump(sample[4:5], rows[4:5], seed, step, ids[4:5], site))


def test_zero_coefficients_remove_their_operand():
    sample = torch.full((3, 6), float("inf"))
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    result = forward_jump(sample, rows, 0, 0, torch.arange(3))
    assert result[0].isfinite().all()
    assert result[1].equal(sample[1])
    assert result[2].equal(torch.zeros(6))


def test_any_layout_gives_the_logical_result():
    sample, rows, *rest = arguments((3, 4, 8, 8))
    expected = forward_jump(sample, rows, *rest)
    assert forward_jump(sample.to(memory_format=torch.channels_last), rows, *rest).equal(expected)
    assert forward_jump(sample.transpose(1, 3).contiguous().transpose(1, 3), rows.double(), *rest).equal(expected)
    assert forward_jump(sample[:1].expand(3, -1, -1, -1), rows, *rest).shape == sample.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_take_the_reference(dtype):
    sample, rows, *rest = arguments((3, 40))
    result = forward_jump(sample.to(dtype), rows, *rest)
    assert result.equal(reference.forward_jump(sample.to(dtype), rows, *rest))
    assert result.dtype == dtype


def test_gradients_flow():
    sample, rows, *rest = arguments((3, 40))
    forward_jump(sample.requires_grad_(), rows, *rest).sum().backward()
    torch.testing.assert_close(sample.grad, rows[:, :1].expand(3, 40))


def test_without_the_extension_it_says_so_and_draws_the_same_noise(monkeypatch):
    expected = forward_jump(*arguments((4, 10)))
    monkeypatch.setattr(extension, "_C", None)
    with pytest.warns(RuntimeWarning, match="slower reference"):
        result = forward_jump(*arguments((4, 10)))
    assert (result - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, 3)}, r"rows \(3, 3\).*expected \[B, ...\], \[B, 2\] and \[B\]"),
        ({"sample_ids": torch.arange(4)}, r"sample_ids \(4,\)"),
        ({"sample": torch.tensor(1.0)}, r"sample \(\)"),
        ({"sample": torch.zeros(3, 5, dtype=torch.int64)}, "float sample"),
        ({"sample_ids": torch.zeros(3)}, "integer ids"),
        ({"rows": torch.zeros(3, 2, device="meta")}, "one device"),
        ({"seed": -1}, r"seed in \[0, 2\^64\); got -1"),
        ({"step": 2**32}, r"step in \[0, 2\^32\)"),
        ({"site": -3}, "site in"),
    ],
)
def test_bad_arguments_are_named(change, message):
    sample, rows, seed, step, ids, site = arguments((3, 5))
    call = {"sample": sample, "rows": rows, "seed": seed, "step": step, "sample_ids": ids, "site": site} | change
    with pytest.raises(ValueError, match=message):
        forward_jump(**call)
